"""Fine-tuning of encoded examples with PEFT and TRL: what was scored is token for token what is trained on."""

import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from gradshield.data.encode import Example
from gradshield.errors import UserError
from gradshield.model import Model
from gradshield.progress import progress
from gradshield.settings import FinetuneSettings


def finetune(model: Model, examples: Sequence[Example], out: Path, settings: FinetuneSettings) -> dict[str, float]:
    """Trains on `examples` and saves to `out` as safetensors: an adapter, or a whole model with its tokenizer.

    The model itself is left as it was. Stopped in the middle, the same call goes on from the last whole epoch (its
    checkpoints are in `out` until the end). Returns {"loss": mean training loss, "steps": optimizer steps, "seconds"}.
    Raises UserError when the loss stops being finite, or one row alone does not fit; nothing is saved then.
    """
    micro = min(settings.micro_batch or settings.batch, settings.batch)
    while True:
        try:
            return _train(model, examples, out, settings, micro)
        except (torch.OutOfMemoryError, MemoryError) as error:
            if micro == 1:
                longest = max(len(e.ids) for e in examples)
                raise UserError(
                    f"fine-tuning on one row of {longest} tokens does not fit into memory: lower --max-length"
                ) from error
        micro //= 2
        torch.cuda.empty_cache()
        logging.getLogger("gradshield").warning("out of memory: going on with %d rows at once", micro)


def _train(
    model: Model, examples: Sequence[Example], out: Path, settings: FinetuneSettings, micro: int
) -> dict[str, float]:
    from datasets import Dataset
    from transformers import PrinterCallback, set_seed

    set_seed(settings.seed)
    rows = [{"input_ids": e.ids.tolist(), "labels": _labels(e)} for e in examples]
    checkpoints = out / "checkpoints"
    with _trainable(model, settings) as net, warnings.catch_warnings(action="ignore"):  # of TRL's own calls
        trainer = _trainer(net, model.tokenizer, Dataset.from_list(rows), checkpoints, settings, micro)
        trainer.remove_callback(PrinterCallback)
        with _progress(trainer, round(settings.epochs * len(rows)), settings.batch):
            trained = trainer.train(resume_from_checkpoint=_last_whole(checkpoints))
        weights = (w for w in net.parameters() if w.requires_grad)
        if not isfinite(trained.training_loss) or not all(bool(w.isfinite().all()) for w in weights):
            shutil.rmtree(checkpoints, ignore_errors=True)
            raise UserError(f"fine-tuning diverged (loss {trained.training_loss}); lower the learning rate")
        if trainer.accelerator.is_main_process:
            _save(net, model, out, settings)
    shutil.rmtree(checkpoints, ignore_errors=True)
    return {
        "loss": trained.training_loss,
        "steps": trained.global_step,
        "seconds": trained.metrics["train_runtime"],
    }


@contextmanager
def _trainable(model: Model, settings: FinetuneSettings) -> Iterator[Any]:
    """The network with what is to be trained laid over it (LoRA) or thawed; as before, frozen, afterwards."""
    if settings.method == "lora":
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=settings.lora_rank,
            lora_alpha=settings.lora_alpha,
            lora_dropout=settings.lora_dropout,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
            base_model_name_or_path=model.name,
        )
        net: Any = get_peft_model(model.net, config)
        before: dict[str, torch.Tensor] = {}
    else:
        net = model.net.requires_grad_(True)
        before = {name: weight.detach().to("cpu", copy=True) for name, weight in net.named_parameters()}
    try:
        yield net
    finally:
        if settings.method == "lora":
            net.unload()
        with torch.no_grad():
            for name, weight in before.items():
                model.net.get_parameter(name).copy_(weight)
        model.net.__dict__.pop("forward", None)  # TRL's fused head stays on the model otherwise
        model.net.eval()
        model.net.requires_grad_(False)
        model.net.config.use_cache = True


@contextmanager
def _progress(trainer: Any, rows: int, batch: int) -> Iterator[None]:
    """A progress line of the trainer's steps; those of an earlier run are not in the rate."""
    from transformers import TrainerCallback

    with progress("fine-tuning", 0, rows) as advance:

        class Line(TrainerCallback):
            shown = 0

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                done = min(rows, state.global_step * batch)
                advance(0, done - self.shown)
                self.shown = done

        trainer.add_callback(Line())
        yield


def _save(net: Any, model: Model, out: Path, settings: FinetuneSettings) -> None:
    """An adapter whose config names its base, or a whole model that loads without the one it came from."""
    if settings.method == "lora":
        net.peft_config["default"].base_model_name_or_path = model.name
    elif hasattr(net.config, "quantization_config"):  # left by a GGUF, whose weights are plain floats by now
        del net.config.quantization_config
    net.save_pretrained(str(out), safe_serialization=True)
    if settings.method == "full":
        model.tokenizer.save_pretrained(str(out))


def _last_whole(checkpoints: Path) -> str | None:
    """The last checkpoint that was written to its end: its trainer_state.json, which comes last, can be read."""
    for folder in sorted(checkpoints.glob("checkpoint-*"), key=lambda p: -int(p.name.split("-")[1])):
        try:
            json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
            return str(folder)
        except (OSError, ValueError):
            shutil.rmtree(folder)
    return None


def _labels(example: Example) -> list[int]:
    return [int(t) if m else -100 for t, m in zip(example.ids, example.mask)]


def _trainer(net: Any, tokenizer: Any, dataset: Any, out: Path, settings: FinetuneSettings, micro: int) -> Any:
    from trl import SFTConfig, SFTTrainer

    logging.getLogger("trl").setLevel(logging.ERROR)
    logging.getLogger("transformers.trainer").setLevel(logging.ERROR)
    on_cpu = not torch.cuda.is_available()
    processes = int(os.environ.get("WORLD_SIZE", "1"))  # set by accelerate launch
    config = SFTConfig(
        output_dir=str(out),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=max(1, settings.batch // (micro * processes)),
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
        save_strategy="epoch",
        save_total_limit=1,
        logging_strategy="no",
        logging_nan_inf_filter=False,  # or a diverged run reports the mean of the losses before
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    return SFTTrainer(model=net, args=config, train_dataset=dataset, processing_class=tokenizer)
