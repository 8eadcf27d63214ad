"""Fine-tuning of encoded examples with PEFT and TRL, on exactly the tokens that were scored."""

import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from gradshield.base.errors import Diverged, UserError, one_line, out_of_memory
from gradshield.base.processes import is_first, is_lost_connection, processes
from gradshield.base.progress import progress
from gradshield.base.settings import FinetuneSettings
from gradshield.data.encode import Example
from gradshield.models.hooks import without_cudnn_attention
from gradshield.models.load import Model
from gradshield.models.network import quiet_loading
from gradshield.training.interventions import NO_HOOKS, Batch, Hooks, nothing, own_loss

MODEL_INPUTS = ("input_ids", "attention_mask", "labels")
STATE = "defense.safetensors"  # of a checkpoint: `Hooks.state`


def finetune(
    model: Model, examples: Sequence[Example], out: Path, settings: FinetuneSettings, hooks: Hooks = NO_HOOKS
) -> dict[str, float]:
    """Trains on `examples` and saves to `out` as safetensors: an adapter, or a whole model with its tokenizer.

    The model itself is left as it was. Safe to interrupt: the same call resumes from the last whole epoch (its
    checkpoints are in `out` until the end). Where a launcher started several processes, all of them call this with the
    same arguments: they share out the rows of each step, and the first one saves.
    Returns {"loss": mean training loss, "steps": optimizer steps, "seconds"}. Raises UserError for what can't be
    trained, also when one row alone does not fit, Diverged when the loss stops being finite; nothing is saved then.
    """
    check_training(settings)
    check_method(model, settings)
    check_device(model)
    count = processes()
    share = settings.batch // count
    micro = _divisor(share, settings.micro_batch or share)
    while True:
        try:
            return _train(model, examples, out, settings, micro, hooks)
        except SafetensorError as error:
            raise UserError(f"{out}: the model can't be written ({error}); free some space and run it again") from error
        except (RuntimeError, MemoryError) as error:
            if "PytorchStreamWriter" in str(error) or "inline_container" in str(error):  # of a checkpoint
                why = "a checkpoint can't be written; is the disk full?"
                raise UserError(f"{out}: {why} Free some space and run it again") from error
            if not out_of_memory(error):
                if count == 1 or not is_lost_connection(error):
                    raise
                why = one_line(error, 160)
                raise UserError(f"another process of the training ended ({why}); start it again to resume") from error
            longest = max(len(e.ids) for e in examples)
            if micro == 1:
                raise UserError(
                    f"fine-tuning on one row of {longest} tokens does not fit into memory: lower --max-length"
                ) from error
            fits = _divisor(share, micro // 2)
            if count > 1:  # the others are in the midst of a step, so it can't be done again with fewer
                raise UserError(
                    f"out of memory with {micro} rows of up to {longest} tokens at once; "
                    f"`micro_batch: {fits}` in --config may fit"
                ) from error
        micro = fits
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        logging.getLogger("gradshield").warning("out of memory: trying again with %d rows at once", micro)


def check_training(settings: FinetuneSettings) -> None:
    """Raises UserError where the processes that a launcher started can't train together like one."""
    count = processes()
    if settings.batch % count:
        raise UserError(
            f"--batch {settings.batch} is not divisible by {count} processes: start a number that divides it"
        )
    for name in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in ("1", "true"):
            raise UserError(f"{name} is not supported: launch without it, or use --trainer-command")


def check_method(model: Model, settings: FinetuneSettings) -> None:
    """Raises UserError if the weights are quantised in a way that can't be trained."""
    with quiet_loading():  # bitsandbytes prints a notice when PEFT imports it
        from peft import PeftModel
    if isinstance(model.net, PeftModel):  # not merged, and what lies over it would silently be dropped
        raise UserError(
            f"{model.name}: can't train a second adapter over quantised weights: "
            "leave out --quantize, or merge that adapter into its base"
        )
    if settings.method == "full" and getattr(model.net, "is_quantized", False):
        raise UserError(f"{model.name}: --method full can't train quantised weights: leave out --quantize")


def check_device(model: Model) -> None:
    """Raises UserError for a model on devices where it can't be trained."""
    if processes() > 1 and len(set((getattr(model.net, "hf_device_map", None) or {}).values())) > 1:
        raise UserError("--device auto spreads the model over the devices of one process: start it without a launcher")
    if any(weight.is_meta for weight in model.net.parameters()):
        raise UserError(
            f"{model.name}: does not fit on the devices, and weights left on the CPU or disk can't be trained: "
            "use --quantize 4bit, or a smaller model"
        )


def _divisor(rows: int, most: int) -> int:
    """The largest number up to `most` that divides `rows`, so that the rows of a step stay as many as asked for."""
    return next(n for n in range(min(rows, max(1, most)), 0, -1) if rows % n == 0)


def _train(
    model: Model, examples: Sequence[Example], out: Path, settings: FinetuneSettings, micro: int, hooks: Hooks
) -> dict[str, float]:
    from datasets import Dataset
    from transformers import PrinterCallback, set_seed

    set_seed(settings.seed)
    dtype = model.net.dtype
    columns: dict[str, Any] = {"input_ids": [e.ids for e in examples], "index": list(range(len(examples)))}
    columns["labels"] = [np.where(e.mask, e.ids, -100) for e in examples]
    checkpoints = out / "checkpoints"
    ignored = warnings.catch_warnings(action="ignore")  # of PEFT's and TRL's own calls
    with ignored, without_cudnn_attention(), _trainable(model, settings) as net:
        on_cpu = model.device.type == "cpu"
        hooks.adapt(net)
        data = Dataset.from_dict(columns)
        trainer = _trainer(net, model.tokenizer, data, checkpoints, settings, micro, on_cpu, hooks)
        trainer.remove_callback(PrinterCallback)
        with trainer.accelerator.main_process_first():  # which clears away what is torn
            last = _last_whole(checkpoints)
        with _progress(trainer, round(settings.epochs * len(examples)), settings.batch), _labelled_logits(on_cpu):
            trained = trainer.train(resume_from_checkpoint=last)
        # Each process has the loss of its own rows; all must come to the same verdict.
        own = torch.tensor(_mean_loss(trainer.state), dtype=torch.float64, device=trainer.args.device)
        loss = float(trainer.accelerator.reduce(own, "mean"))
        diverged = not isfinite(loss) or not all(bool(w.isfinite().all()) for w in net.parameters() if w.requires_grad)
        if not diverged:
            with torch.no_grad():
                hooks.finish(net)
        if is_first() and not diverged:
            _save(net, model, out, settings, dtype)
        trainer.accelerator.wait_for_everyone()  # or another still writes to the checkpoints
    if is_first() and checkpoints.exists():  # cleared away whole: the next call would resume from half of one
        cleared = out / ".checkpoints"
        shutil.rmtree(cleared, ignore_errors=True)  # left by a kill in the next line but one
        checkpoints.rename(cleared)
        shutil.rmtree(cleared, ignore_errors=True)
    if diverged:
        raise Diverged(f"fine-tuning diverged (loss {loss}); lower the learning rate", trained.global_step)
    return {"loss": loss, "steps": trained.global_step, "seconds": trained.metrics["train_runtime"]}


@contextmanager
def _trainable(model: Model, settings: FinetuneSettings) -> Iterator[Any]:
    """Context with the network ready to train: with a LoRA adapter, or with its weights unfrozen. Restores it."""
    forward = model.net.__dict__.get("forward")  # a device map's
    if settings.method == "lora":
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=settings.lora_rank,
            lora_alpha=settings.lora_alpha,
            lora_dropout=settings.lora_dropout,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
            base_model_name_or_path=model.base,
        )
        net: Any = get_peft_model(model.net, config)
        before: dict[str, torch.Tensor] = {}
    else:
        net = model.net.requires_grad_(True)
        before = {name: weight.detach().to("cpu", copy=True) for name, weight in net.named_parameters()}
        for weight in net.parameters():  # a step of 1e-4 is less than bfloat16 can add to most weights
            weight.data = weight.data.float()
    try:
        yield net
    finally:
        if settings.method == "lora":
            net.unload()
        with torch.no_grad():
            for name, weight in before.items():
                trained = model.net.get_parameter(name)
                trained.grad, trained.data = None, weight.to(trained.device)
        model.net.__dict__.pop("forward", None)  # TRL's fused head stays on the model otherwise
        if forward is not None:
            model.net.forward = forward
        model.net.eval()
        model.net.requires_grad_(False)
        model.net.config.use_cache = True


def _mean_loss(state: Any) -> float:
    """The mean of the losses of all steps; what the Trainer returns leaves out those before it was resumed."""
    total, before = 0.0, 0
    for line in state.log_history:
        if "loss" in line:
            total += line["loss"] * (line["step"] - before)
            before = line["step"]
    return total / max(before, 1)


@contextmanager
def _labelled_logits(on_cpu: bool) -> Iterator[None]:
    """Context in which TRL computes logits at labelled positions only, also on a CPU.

    Without Triton, TRL computes all of them, for devices that compile. On a CPU that is up to half of a step. Versions
    of TRL without this switch are left as they are.
    """
    from trl.trainer import utils

    if on_cpu and hasattr(utils, "_use_triton"):
        with patch.object(utils, "_use_triton", lambda device: True):
            yield
    else:
        yield


@contextmanager
def _progress(trainer: Any, rows: int, batch: int) -> Iterator[None]:
    """A progress line of the trainer's steps; those of an earlier run are not in the rate."""
    from transformers import TrainerCallback

    if not is_first():
        yield
        return
    with progress("fine-tuning", 0, rows) as advance:

        class Line(TrainerCallback):
            shown = 0

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                done = min(rows, state.global_step * batch)
                if done > self.shown:  # the last step may be of a few rows
                    advance(0, done - self.shown)
                self.shown = done

        trainer.add_callback(Line())
        yield


def _save(net: Any, model: Model, out: Path, settings: FinetuneSettings, dtype: torch.dtype) -> None:
    """An adapter whose config names its base, or a whole model that loads without the one it came from."""
    if settings.method == "lora":
        net.peft_config["default"].base_model_name_or_path = model.base
    elif hasattr(net.config, "quantization_config"):  # left by a GGUF, whose weights are already plain floats
        del net.config.quantization_config
    if settings.method == "full":
        for weight in net.parameters():  # as precise as the model that it came from
            weight.grad, weight.data = None, weight.data.to(dtype)
        model.tokenizer.save_pretrained(str(out))
    (out / "README.md").unlink(missing_ok=True)  # a torn one, which PEFT would read in and add to
    net.save_pretrained(str(out), safe_serialization=True)


def _last_whole(checkpoints: Path) -> str | None:
    """The last checkpoint that is whole: its trainer_state.json, which is written last and cleared away with the rest,
    can be read, and its weights are there."""
    for folder in sorted(checkpoints.glob("checkpoint-*"), key=lambda p: -int(p.name.split("-")[1])):
        try:
            json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
            return str(folder)
        except (OSError, ValueError):
            shutil.rmtree(folder)
    return None


def _trainer(
    net: Any,
    tokenizer: Any,
    dataset: Any,
    out: Path,
    settings: FinetuneSettings,
    micro: int,
    on_cpu: bool,
    hooks: Hooks,
) -> Any:
    from transformers import TrainerCallback
    from transformers.utils.logging import disable_progress_bar
    from trl import SFTConfig, SFTTrainer

    for name in ("trl", "transformers.trainer", "transformers.trainer_utils"):
        logging.getLogger(name).setLevel(logging.ERROR)
    disable_progress_bar()  # of every checkpoint's files
    config = SFTConfig(
        output_dir=str(out),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=settings.batch // (micro * processes()),
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup,
        num_train_epochs=settings.epochs,
        seed=settings.seed,
        max_length=None,
        bf16=not on_cpu,
        use_cpu=on_cpu,
        gradient_checkpointing=False,
        save_strategy="epoch",
        save_total_limit=1,
        logging_strategy="epoch",  # to the checkpoint, from which a resumed run has the losses before it
        logging_nan_inf_filter=False,  # or a diverged run reports the mean of the losses before
        max_grad_norm=1.0 if hooks.gradient is nothing else 0.0,  # else clipped after the hook, by `Gradient`
        remove_unused_columns=False,  # keeps `index`
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    if config.n_gpu > 1:  # one process trains on one, and torchrun starts one for each
        config._n_gpu = 1

    class ByLength(SFTTrainer):
        def _get_train_sampler(self, *_args: Any, **_kwargs: Any) -> Any:
            lengths = [len(ids) for ids in dataset["input_ids"]]
            return _Order(lengths, settings, lambda: round(self.state.epoch or 0))

        def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
            samples, tokens = super().get_batch_samples(*args, **kwargs)
            self.step_rows = sum(len(batch["index"]) for batch in samples)
            return samples, tokens

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None):
            # On a device map, TRL's loss is where the head is, and the count of tokens on the first device.
            if torch.is_tensor(num_items_in_batch):
                num_items_in_batch = num_items_in_batch.to(net.get_output_embeddings().weight.device)

            def loss_of(batch: Batch, outputs: bool = False) -> Any:
                given = {name: batch[name] for name in MODEL_INPUTS}
                return super(ByLength, self).compute_loss(model, given, outputs, num_items_in_batch)

            if return_outputs or hooks.loss is own_loss:
                found = loss_of(inputs, return_outputs)
            else:
                rows, tokens = self.step_rows, num_items_in_batch
                if tokens is None:  # then the Trainer takes the mean over the batches of a step
                    rows, tokens = len(inputs["index"]), (inputs["labels"][:, 1:] != -100).sum()
                else:
                    tokens = tokens / processes()
                counts = {"step_rows": torch.as_tensor(rows), "step_tokens": torch.as_tensor(tokens)}
                found = hooks.loss(model, {**inputs, **counts}, loss_of, self.state.global_step)
            if return_outputs:
                return found[0].to(self.args.device), found[1]
            return found.to(self.args.device)

        def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
            super()._save(output_dir, state_dict)
            if hooks.state and output_dir and self.args.should_save:
                save_file(hooks.state, Path(output_dir) / STATE)

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            if hooks.state:
                for name, value in load_file(Path(resume_from_checkpoint) / STATE).items():
                    hooks.state[name].copy_(value)

    class Gradient(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            hooks.gradient(net, state.global_step)
            trainer.accelerator.clip_grad_norm_(net.parameters(), 1.0)

    trainer = ByLength(model=net, args=config, train_dataset=dataset, processing_class=tokenizer)
    joined = trainer.data_collator
    trainer.data_collator = lambda rows: {**joined(rows), "index": torch.tensor([row["index"] for row in rows])}
    if hooks.gradient is not nothing:
        trainer.add_callback(Gradient())
    return trainer


class _Order(torch.utils.data.Sampler):
    """Rows of like length near each other, in an order that depends on the seed and the epoch alone. It is the same in
    all processes, whatever their number, and after a resume."""

    def __init__(self, lengths: Sequence[int], settings: FinetuneSettings, epoch: Callable[[], int]) -> None:
        self.lengths, self.settings, self.epoch = list(lengths), settings, epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        from transformers.trainer_pt_utils import get_length_grouped_indices

        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + self.epoch())
        return iter(get_length_grouped_indices(self.lengths, self.settings.batch, generator=generator))
