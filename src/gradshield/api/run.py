"""A run folder as an object: its rows by verdict, their scores, and the paths."""

import os
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from gradshield.base.errors import UserError
from gradshield.base.storage import read_jsonl, read_yaml, refuse_links
from gradshield.data import open_source, read_rows
from gradshield.data.run_folder import read_table, rows_file
from gradshield.data.summaries import FilterSummary, TuneSummary, read_summary
from gradshield.report.text import number, visible

if TYPE_CHECKING:
    from pandas import DataFrame

VERDICTS = ("kept", "quarantined", "set_aside")
S = TypeVar("S", FilterSummary, TuneSummary)
_FILES = {"scores": "scores.parquet", "report": "report.html", "train": "train.py", "model": "model"}


class Run(Generic[S]):
    """A finished run of `screen` or `tune`, as its folder holds it.

    `summary` is what the command found, with attributes such as `.threshold.value` or `.accepted`; after a review was
    applied, its counts are the review's. Read from the folder on first use are `kept` and `quarantined`, the rows as
    dicts; `set_aside`, dicts of source, line, reason and raw row; and `scores`, a table with a line for each row of the
    input.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Raises UserError where the folder holds no finished run, or is damaged."""
        if not isinstance(folder, str | os.PathLike):
            raise UserError(f"Run({folder!r}): give the path of a run folder")
        self.folder = Path(folder).absolute()  # so that it stays the same after os.chdir
        if not (self.folder / "run.yaml").is_file():
            raise UserError(f"{self.folder}: not a run folder (it has no run.yaml)")
        refuse_links(self.folder)
        self.saved = read_yaml(self.folder / "run.yaml")
        found = self.saved.get("summary")
        if not isinstance(found, dict):
            raise UserError(f"{self.folder}: the run is not finished; run it again to resume it")
        kind = TuneSummary if "accepted" in found else FilterSummary
        review = self.saved.get("review", {})
        counts = {name: review[name] for name in VERDICTS if name in review}
        self.summary = cast(S, read_summary(kind, found | counts, self.folder / "run.yaml", "summary"))

    @cached_property
    def paths(self) -> dict[str, Path]:
        """Paths of the existing files: kept, quarantined, set_aside, scores, report, train (a script), model (tune)."""
        found = {name: rows_file(self.folder, name) for name in VERDICTS}
        found |= {name: self.folder / file for name, file in _FILES.items()}
        if isinstance(self.summary, TuneSummary):  # a search, whose scores are those of its screening
            found["scores"] = self.folder / "screen" / _FILES["scores"]
        return {name: path for name, path in found.items() if path and path.exists()}

    @cached_property
    def kept(self) -> list[dict[str, Any]]:
        return self._rows("kept")

    @cached_property
    def quarantined(self) -> list[dict[str, Any]]:
        return self._rows("quarantined")

    @cached_property
    def set_aside(self) -> list[dict[str, Any]]:
        file = self._file("set_aside")
        return read_jsonl(file) if file else []

    @cached_property
    def scores(self) -> "DataFrame":
        """scores.parquet: row (from 1), place, group, verdict, reason, score and the scorer's signals."""
        if "scores" not in self.paths:
            raise UserError(f"{self.folder}: no row was scored")
        return read_table(self.paths["scores"].parent).to_pandas()

    def _file(self, verdict: str) -> Path | None:
        """The file or folder of the rows with this verdict; None for a rejected search, which has none. Raises
        UserError if it is missing."""
        path = self.paths.get(verdict)
        if path and path.exists():
            return path
        if isinstance(self.summary, TuneSummary) and self.summary.accepted is None:
            return None
        what = f"the file of the rows that are {verdict.replace('_', ' ')}"
        raise UserError(f"{self.folder}: {what} is missing; delete the folder, and run the same command again")

    def _rows(self, verdict: str) -> list[dict[str, Any]]:
        path, given = self._file(verdict), self.saved["input"]["format"]
        if path is None or not any(file.stat().st_size for file in (path.rglob("*") if path.is_dir() else [path])):
            return []
        source = open_source(path, "jsonl" if given == "hub" else given)
        return [row.record for row in read_rows(source) if row.record is not None]

    def __repr__(self) -> str:
        summary, lines = self.summary, [f"Run({str(self.folder)!r})"]
        for name in ("rows", *VERDICTS):
            path = f"  {self.paths[name]}" if name in self.paths else ""
            count = number(getattr(summary, name)) if name in summary.model_fields_set else "none"
            lines.append(f"  {name.replace('_', ' '):<12}{count:>9}{path}")
        if isinstance(summary, TuneSummary):
            verdict = "rejected" if summary.accepted is None else f"trial {summary.accepted} accepted"
            lines.append(f"  {'search':<12}{verdict}: {summary.reason}")
        else:
            value, rule = summary.threshold.value, summary.threshold.rule
            lines.append(f"  {'threshold':<12}{number(value) if value is not None else 'none':>9}  {rule}")
        lines += [f"  {name:<12}{'':>9}  {self.paths[name]}" for name in _FILES if name in self.paths]
        return visible("\n".join(lines))
