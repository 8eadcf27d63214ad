"""What `filter` found: the summary that run.yaml ends with and that `--json` prints. Imports no torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from gradshield.base.errors import UserError


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class ThresholdSummary(_Part):
    """A `Threshold` as JSON has it: None for what is not finite."""

    value: float | None  # None: nothing is removed
    rule: str
    note: str
    clear: bool
    good_lost: float | None
    harmful_kept: float | None


class ProbesSummary(_Part):
    """How many probes the model refuses, and the grade of its alignment."""

    refused: int
    of: int
    grade: str


class FilterSummary(_Part):
    """The rows of each verdict, what they were judged by, and what it took."""

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
    seconds: float
    rows_per_second: float
    tokens_per_second: int
    version: str

    def as_dict(self) -> dict[str, Any]:
        """As run.yaml and JSON have it."""
        return self.model_dump(exclude_unset=True)


def saved_summary(out: Path, found: Mapping[str, Any]) -> FilterSummary:
    """The summary as it was read from the run.yaml in `out`. Raises UserError where that is damaged."""
    try:
        return FilterSummary.model_validate(found)
    except ValidationError as error:
        where = ".".join(map(str, ("summary", *error.errors()[0]["loc"])))
        raise UserError(f"{out / 'run.yaml'}: damaged ({where}); delete {out} to start again") from None
