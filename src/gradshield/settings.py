"""The settings of a filter run, declared once: the command's flags and run.yaml follow from them. Imports no torch."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class FilterSettings(BaseModel):
    """Every setting of a run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(
        default="embedded", description='Hub id, local folder, .gguf file, adapter folder, or "embedded"'
    )
    adapter: str | None = Field(default=None, description="PEFT adapter laid over the model")
    quantize: Literal["4bit", "8bit"] | None = Field(
        default=None, description="load the weights quantised (bitsandbytes)"
    )
    device: str | None = Field(default=None, description='torch device, or "auto" to spread over all')
    dtype: str | None = Field(default=None, description="float32, bfloat16 or float16 (default: float32 on a CPU)")
    chat_template: str | None = Field(
        default=None, description="file with a chat template to use instead of the tokenizer's"
    )
    trust_remote_code: bool = Field(default=False, description="run code that comes with the model")
    format: str | None = Field(default=None, description="jsonl, json, csv, parquet or text (default: told by content)")
    columns: dict[str, str] | None = Field(
        default=None, description="which column is prompt, response, system, messages, text"
    )
    split: str = Field(default="train", description="split of a Hub dataset")
    max_length: int = Field(default=1024, ge=2, description="tokens a row is cut to, as in the fine-tuning")
    loss_on: Literal["assistant", "last", "all"] = Field(
        default="assistant", description="tokens that the fine-tuning trains on"
    )
    variant: Literal["intent", "paper", "cosine", "module"] = Field(
        default="intent", description="the score (docs: scores)"
    )
    safety_score: Literal["paper", "own"] = Field(
        default="paper", description="S of FIHS: I − Sure, or the model's own tokens"
    )
    contrast: Literal["minus", "orthogonal"] | None = Field(
        default=None, description="FIHS with the gradient of harmless-request probes taken off, or projected out"
    )
    weights: Literal["linear", "lora", "all"] = Field(
        default="linear", description="weights that FIHS is over: the decoder's Linears, a LoRA adapter's, all (slow)"
    )
    mapping: Literal["identity", "sign"] = Field(
        default="identity", description="g of eq. 4: the gradient, or its sign as in Adam's first step (slow)"
    )
    probes: str | None = Field(default=None, description="file of harmful requests to use as probes (default: bundled)")
    probe_count: int = Field(default=12, ge=1, description="probes that carry FIHS's gradient")
    threshold: Literal["anchored", "a1", "fixed", "share"] = Field(
        default="anchored", description="how the threshold is found"
    )
    value: float | None = Field(default=None, description="the threshold itself, or the share, for fixed and share")
    alpha: float = Field(default=10.0, description="A1: log-likelihood gain from which two groups are seen")
    reference: str | None = Field(
        default=None, description="file of known-good rows that sharpen the anchored threshold"
    )
    batch_tokens: int = Field(default=2048, ge=1, description="tokens of a batch, padding included")
    force: bool = Field(default=False, description="go on with a model that is not aligned")
