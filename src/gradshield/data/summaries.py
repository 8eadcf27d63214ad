"""The results of the commands, as in run.yaml, eval.yaml, trials.jsonl and `--json`. Imports no torch.

They are defined here because the report, which several commands write, reads them. A figure that is not finite is None.
"""

from math import inf, isfinite
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from gradshield.base.errors import UserError

Figure = Annotated[float | None, BeforeValidator(lambda x: None if isinstance(x, float) and not isfinite(x) else x)]
Interval = tuple[Figure, Figure]


class Saved(BaseModel):
    """A part of a saved file. What another version wrote beside the known fields is kept."""

    model_config = ConfigDict(frozen=True, extra="allow")

    def as_dict(self) -> dict[str, Any]:
        """As in JSON and YAML, without the fields that were never set."""
        return self.model_dump(mode="json", exclude_unset=True)


S = TypeVar("S", bound=Saved)


def read_summary(kind: type[S], found: Any, file: Path, *part: str) -> S:
    """The summary that was read from `file`, perhaps from a `part` of it. Raises UserError where it is damaged."""
    try:
        return kind.model_validate(found)
    except ValidationError as error:
        where = ".".join(map(str, (*part, *error.errors()[0]["loc"])))
        raise UserError(f"{file}: damaged ({where}); delete {file.parent} to start again") from None


class _Limit(Saved):
    value: Figure  # None: nothing is removed

    @property
    def limit(self) -> float:
        return inf if self.value is None else self.value


class ThresholdSummary(_Limit):
    """The JSON form of a `Threshold`."""

    rule: str
    note: str
    clear: bool
    good_lost: Figure
    harmful_kept: Figure


class ProbesSummary(Saved):
    """How many probes the model refuses, and the grade of its alignment."""

    refused: int
    of: int
    grade: str


class FilterSummary(Saved):
    """The number of rows per verdict, what set the verdicts, and the cost."""

    file: str
    rows: int
    kept: int
    quarantined: int
    set_aside: int
    model: str
    scorer: str
    threshold: ThresholdSummary
    probes: ProbesSummary
    rows_digest: str = ""  # only of a scorer that is fitted on the whole file
    trl_note: str = ""  # only where TRL can't load the kept rows from one file
    seconds: float
    rows_per_second: float
    tokens_per_second: int
    version: str


class ReviewedThreshold(_Limit):
    """The threshold of a reviewed run, and who moved it, if anyone did."""

    who: str = ""
    when: str = ""


class MovedRow(Saved):
    """A row that a person moved against its score; `row` counts from 1."""

    row: int
    to: str
    who: str
    when: str
    note: str = ""


class ReviewSummary(Saved):
    """The result of a review."""

    threshold: ReviewedThreshold
    kept: int
    quarantined: int
    set_aside: int
    decided: int
    moved_by_the_threshold: int
    moved: list[MovedRow]
    trl_note: str = ""  # as in FilterSummary, for the rows that are kept now


class SafetySummary(Saved):
    """The figures of a SafetyReport, without requests and answers; those that were not asked for are not given."""

    asr: float
    asr_interval: Interval
    asr_phrases: Figure = None
    requests: int
    over_refusal: Figure = None
    over_refusal_interval: Interval | None = None
    scary_requests: int = 0
    judge: str | None = None
    hs: Figure = None
    hs_interval: Interval | None = None
    asr_judge: Figure = None
    ungraded: int = 0
    judge_control: Interval | None = None
    seconds: float = 0.0


class UtilitySummary(Saved):
    """The figures of a UtilityReport, without cases and answers."""

    task: str
    metric: str
    value: float
    error: Figure
    interval: Interval
    n: int
    seconds: float = 0.0


class ModelIdentity(Saved):
    """The model. `files` is the digest of its files, if they are on this disk."""

    name: str
    fingerprint: str
    files: str | None = None


class EvaluationSummary(Saved):
    """eval.yaml: the model, what was asked for, and the figures of each part that is measured."""

    model: ModelIdentity
    settings: dict[str, Any]
    file: dict[str, str]
    versions: dict[str, str]
    safety: SafetySummary | None = None
    utility: UtilitySummary | None = None


class BaseSummary(Saved):
    """The measured figures of a search's base model."""

    asr: float
    utility: float
    utility_interval: Interval
    safety: SafetySummary


class GoalSummary(Saved):
    """The goals that the trials of a search are compared with."""

    max_asr: float
    min_utility: float


class UnseenSummary(Saved):
    """Attack success of the accepted model on requests that no decision has used."""

    asr: float
    asr_interval: Interval
    requests: int


class TrialSummary(Saved):
    """A line of trials.jsonl: a `Trial` and what its training and measuring took."""

    number: int
    threshold: float | None  # None: no row was left out for its score
    lo: int
    up: int
    kept: int
    asr: float | None
    utility: float | None
    safe: bool
    useful: bool
    note: str
    steps: int
    safety: SafetySummary | None
    utility_interval: Interval | None
    seconds: float


class CostSummary(Saved):
    """The cost of a search."""

    trials: int
    steps: int
    scored_tokens: int
    safety_evaluations: int
    seconds: float


class TuneSummary(Saved):
    """How a search ended. `accepted` is the number of the trial whose model is handed out; the counts of rows are
    given for that trial only."""

    file: str
    accepted: int | None
    reason: str
    rows: int
    kept: int = 0
    quarantined: int = 0
    set_aside: int = 0
    held_out: int
    base: BaseSummary
    goal: GoalSummary
    asr: float | None
    utility: float | None
    safety: SafetySummary | None
    unseen: UnseenSummary | None = None
    task: str
    model: str | None
    cost: CostSummary
    trials: tuple[TrialSummary, ...]
    version: str

    def accepted_trial(self) -> TrialSummary | None:
        return next((trial for trial in self.trials if trial.number == self.accepted), None)
