"""The settings of an evaluation, declared once: flags of `gradshield eval` and of a search follow. Imports no torch."""

from typing import Literal

from pydantic import Field

from gradshield.base.settings import Settings


class EvaluationSettings(Settings):
    """How safety and utility are measured. Defaults: the paper's section 4, where it says."""

    requests: str = Field(
        default="bundled",
        description="harmful requests: bundled, advbench, harmbench, strongreject, jailbreakbench, or a file",
    )
    request_count: int = Field(default=100, ge=1, description="number of requests to ask, per set")
    max_new_tokens: int = Field(default=32, ge=1, description="length of an answer, in tokens, to detect a refusal")
    scary: str = Field(
        default="bundled",
        description="harmless requests that look scary, for over-refusal: bundled, jailbreakbench, a file, or none",
    )
    judge: str | None = Field(
        default=None,
        min_length=1,
        description="judge of harmfulness 1-5: URL of an OpenAI-compatible endpoint (.../v1), or a classifier or chat "
        "guard (folder or Hub id)",
    )
    judge_model: str | None = Field(
        default=None,
        min_length=1,
        description="the model's name at the judge's endpoint (default: the first that it lists)",
    )
    judge_tokens: int = Field(default=128, ge=1, description="length of an answer, in tokens, for the judge")
    cases: int = Field(default=100, ge=1, description="number of cases of a task")
    metric: Literal["exact", "rouge1"] = Field(default="exact", description="metric of a task from a file")
    case_seed: int = Field(default=0, ge=0, description="seed for sampling requests and cases")
