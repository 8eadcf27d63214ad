"""Settings, declared once: the commands' flags and run.yaml follow from them. Imports no torch."""

import re
from math import isfinite
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

_NUMBER = r"([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?"  # as goals are written


class Settings(BaseModel):
    """Frozen fields, each with a description that `help` shows."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _is_given(cls, value: Any) -> Any:
        if value == "":
            raise ValueError("is empty; give a value, or leave it out")
        return value

    @classmethod
    def __pydantic_init_subclass__(cls, **_: object) -> None:
        fields = [
            f"{name} (default {field.default!r}): {field.description}" for name, field in cls.model_fields.items()
        ]
        cls.__doc__ = "\n".join([cls.__doc__ or "", "", *fields])


class ModelSettings(Settings):
    """The model, and how it is loaded."""

    model: str = Field(
        default="embedded", description='Hub id, local folder, .gguf file, adapter folder, or "embedded"'
    )
    adapter: str | None = Field(default=None, description="PEFT adapter to load on top of the model")
    quantize: Literal["4bit", "8bit"] | None = Field(
        default=None, description="load the weights quantised (bitsandbytes)"
    )
    device: str | None = Field(
        default=None, description='torch device, or "auto": all GPUs (default: cuda if there is one)'
    )
    dtype: str | None = Field(
        default=None, description="float32, bfloat16 or float16 (default: float32 on a CPU, else as saved)"
    )
    chat_template: str | None = Field(
        default=None, description="file with a chat template to use instead of the tokenizer's"
    )
    trust_remote_code: bool = Field(default=False, description="run code that comes with the model")
    # How a run is computed is no part of what it is: fields with exclude=True are not saved and may change on a resume.
    batch_tokens: int | None = Field(
        default=None, ge=1, exclude=True, description="tokens per batch, with padding (default: by the device)"
    )


class RowSettings(ModelSettings):
    """How the rows of a file are read."""

    format: str | None = Field(default=None, description="jsonl, json, csv, parquet or text (default: detected)")
    columns: dict[str, str] | None = Field(
        default=None, description="map a column to prompt, response, system, messages or text"
    )
    split: str = Field(default="train", description="split of a Hub dataset")
    max_length: int = Field(default=1024, ge=2, description="maximum tokens of a row, as in the fine-tuning")
    trainer: Literal["trl", "axolotl", "llamafactory", "openai"] = Field(
        default="trl", description="your trainer, which decides what turns are trained on (docs: data)"
    )
    loss_on: Literal["assistant", "last", "all"] = Field(
        default="assistant", description="tokens that the fine-tuning trains on"
    )


class FilterSettings(RowSettings):
    """How rows are scored, and which rows are quarantined."""

    scorer: str = Field(
        default="intent", description="NAME[:key=value,…]: how rows are scored (gradshield scorers lists them)"
    )
    probes: str | None = Field(default=None, description="file of harmful requests to use as probes (default: bundled)")
    threshold: Literal["anchored", "a1", "fixed", "share"] = Field(
        default="anchored", description="rule that sets the threshold"
    )
    value: float | None = Field(
        default=None,
        description="fixed: the threshold; share: share of rows to quarantine, 0 to 1",
    )
    alpha: float = Field(default=10.0, description="A1: log-likelihood gain above which two groups are assumed")
    reference: str | None = Field(default=None, description="file of known-good rows to add to the good anchors")
    force: bool = Field(default=False, description="continue with a model that is not aligned")
    engine: Literal["local", "ray"] = Field(
        default="local",
        exclude=True,
        description="score on this machine, or on Ray: the cluster that RAY_ADDRESS names, or else this machine alone",
    )
    workers: int | None = Field(
        default=None,
        ge=1,
        exclude=True,
        description="copies of the model on Ray (default: one per GPU, or per machine without GPUs)",
    )


class FinetuneSettings(Settings):
    """How a model is fine-tuned; by default as in the paper's section 4."""

    method: Literal["lora", "full"] = Field(default="lora", description="train a LoRA adapter, or every weight")
    lora_rank: int = Field(default=8, ge=1, description="LoRA rank")
    lora_alpha: int = Field(default=32, ge=1, description="LoRA alpha")
    lora_dropout: float = Field(default=0.0, ge=0, lt=1, description="LoRA dropout")
    learning_rate: float = Field(default=1e-4, gt=0, description="peak learning rate")
    schedule: Literal["linear", "cosine", "constant"] = Field(default="linear", description="learning-rate schedule")
    warmup: float = Field(default=0.0, ge=0, lt=1, description="share of the steps used for warm-up")
    epochs: float = Field(default=3, gt=0, description="passes over the rows")
    batch: int = Field(default=8, ge=1, description="effective batch size in rows")
    micro_batch: int | None = Field(
        default=None, ge=1, exclude=True, description="rows per device and pass (default: the whole batch)"
    )
    seed: int = Field(
        default=0, ge=0, le=2**32 - 1, description="seed of the adapter's initialisation and of the row order"
    )


class TuneSettings(Settings):
    """The goals for a fine-tuned model, and how it is searched for (alg. 1)."""

    defense: str = Field(
        default="gradshield",
        description="NAME[:key=value,…]: what keeps the model safe (gradshield defenses lists them)",
    )
    task: str = Field(
        default="held-out", description="utility measure: held-out (loss on held-out rows), or a task's name or file"
    )
    max_asr: str = Field(
        default="0.05",
        coerce_numbers_to_str=True,
        description="highest attack success rate, at the upper end of its 95 % interval: 0.05, or +0.07 above the base "
        "model's",
    )
    min_utility: str = Field(
        default="base",
        coerce_numbers_to_str=True,
        description="lowest utility: a number, or relative to the base model's: base, base-0.02",
    )
    start: Literal["auto", "paper", "screen"] = Field(
        default="auto",
        description="train on everything first (paper), score first (screen), or whichever is likely cheaper (auto)",
    )
    searches: int = Field(default=3, ge=1, description="maximum number of thresholds to try (N_max)")
    step: float = Field(
        default=0.05, gt=0, lt=0.5, description="minimum share of the rows by which each try narrows the search (λ)"
    )
    literal: bool = Field(
        default=False,
        description="alg. 1 as printed: the first model need not be useful, line 12 drops rows of lowest score, and "
        "the attack success rate is compared instead of its interval",
    )
    trainer_command: str | None = Field(
        default=None, description="train with this command; {data}, {out}, {model}, {seed} and {config} are filled in"
    )
    trainer_config: str | None = Field(
        default=None, description="config file with the same placeholders, passed to the command as {config}"
    )

    @field_validator("max_asr")
    @classmethod
    def _is_share(cls, text: str) -> str:
        if not re.fullmatch(rf"\+?{_NUMBER}", text) or float(text) > 1:
            raise ValueError("must be a share from 0 to 1, such as 0.05, or +0.07 for 0.07 above the base model's")
        return text

    @field_validator("min_utility")
    @classmethod
    def _is_utility(cls, text: str) -> str:
        if not re.fullmatch(rf"-?{_NUMBER}|base([+-]{_NUMBER})?", text) or not isfinite(_after_base(text)):
            raise ValueError("must be a number, base, or base-0.02 for 0.02 below the base model's")
        return text

    def highest_asr(self, base: float) -> float:
        """The highest attack success rate (or upper end of its interval) that is accepted, given the base model's."""
        return base + float(self.max_asr) if self.max_asr.startswith("+") else float(self.max_asr)

    def lowest_utility(self, base: float) -> float:
        """The lowest utility that is accepted, given the base model's."""
        relative = self.min_utility.startswith("base")
        return (base if relative else 0.0) + _after_base(self.min_utility)


def complaint(error: ValidationError) -> str:
    """What is wrong with the first wrong setting, in plain words."""
    return in_plain_words(error.errors()[0]["msg"])


def in_plain_words(message: str) -> str:
    """pydantic's message in our words: "must be a whole number" for "Input should be a valid integer, unable ..."."""
    words = re.sub(", unable to [^.]*", "", message.replace("Value error, ", ""))
    for theirs, ours in (("Input should be", "must be"), ("a valid integer", "a whole number"), ("a valid ", "a ")):
        words = words.replace(theirs, ours)
    return words


def _after_base(text: str) -> float:
    """The number in a goal of utility, without the word that makes it relative."""
    return float(text.removeprefix("base") or 0)
