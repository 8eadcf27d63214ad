"""LoRA fine-tuning of encoded examples with PEFT and TRL: what was scored is token for token what is trained on."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from gradshield.data.encode import Example
from gradshield.errors import UserError
from gradshield.model import Model


class FinetuneSettings(BaseModel):
    """Defaults: the paper's section 4 (LoRA r 8, α 32, effective batch 8, 3 epochs at 1e-4)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: int = Field(default=8, ge=1, description="LoRA rank")
    alpha: int = Field(default=32, ge=1, description="LoRA alpha")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="LoRA dropout")
    learning_rate: float = Field(default=1e-4, gt=0, description="peak learning rate")
    schedule: Literal["linear", "cosine", "constant"] = Field(default="linear", description="learning-rate schedule")
    warmup: float = Field(default=0.0, ge=0, lt=1, description="share of the steps spent warming up")
    epochs: float = Field(default=3, gt=0, description="passes over the rows")
    batch: int = Field(default=8, ge=1, description="effective batch size in rows")
    micro_batch: int | None = Field(
        default=None, ge=1, description="rows a device takes at once (default: the whole batch)"
    )
    seed: int = Field(default=0, ge=0, description="seed of the adapter's initialisation and of the order of rows")


def finetune(model: Model, examples: Sequence[Example], out: Path, settings: FinetuneSettings) -> dict[str, float]:
    """Trains a LoRA adapter on `examples` and saves it to `out` as safetensors; the model itself is left unchanged.

    Returns {"loss": mean training loss, "steps": optimizer steps, "seconds": ...}.
    Raises UserError when the loss stops being finite (nothing is saved then).
    """
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    set_seed(settings.seed)
    rows = [{"input_ids": e.ids.tolist(), "labels": _labels(e)} for e in examples]
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        base_model_name_or_path=model.name,
    )
    wrapped = get_peft_model(model.net, config)
    try:
        trained = _trainer(wrapped, model.tokenizer, Dataset.from_list(rows), out, settings).train()
        if not torch.isfinite(torch.tensor(trained.training_loss)):
            raise UserError(f"fine-tuning diverged (loss {trained.training_loss}); lower the learning rate")
        wrapped.peft_config["default"].base_model_name_or_path = model.name
        wrapped.save_pretrained(str(out), safe_serialization=True)
    finally:
        wrapped.unload()
        model.net.__dict__.pop("forward", None)  # TRL's fused head stays on the model otherwise
        model.net.eval()
        model.net.requires_grad_(False)
        model.net.config.use_cache = True
    return {
        "loss": trained.training_loss,
        "steps": trained.global_step,
        "seconds": trained.metrics["train_runtime"],
    }


def _labels(example: Example) -> list[int]:
    return [int(t) if m else -100 for t, m in zip(example.ids, example.mask)]


def _trainer(net: Any, tokenizer: Any, dataset: Any, out: Path, settings: FinetuneSettings) -> Any:
    from trl import SFTConfig, SFTTrainer

    logging.getLogger("trl").setLevel(logging.ERROR)
    logging.getLogger("transformers.trainer").setLevel(logging.ERROR)
    micro = min(settings.micro_batch or settings.batch, settings.batch)
    on_cpu = not torch.cuda.is_available()
    config = SFTConfig(
        output_dir=str(out),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=max(1, settings.batch // micro),
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup,
        num_train_epochs=settings.epochs,
        seed=settings.seed,
        max_length=None,
        train_sampling_strategy="group_by_length",
        bf16=not on_cpu,
        use_cpu=on_cpu,
        gradient_checkpointing=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    return SFTTrainer(model=net, args=config, train_dataset=dataset, processing_class=tokenizer)
