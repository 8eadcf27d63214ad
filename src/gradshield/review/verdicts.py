"""Scores, a threshold and decisions → the verdict of every row; and which rows a page of the table shows.

A run of 100,000 rows is a handful of arrays, so any view takes milliseconds and nothing has to be kept up to date.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gradshield.base.errors import UserError
from gradshield.data.run_folder import COLUMNS, SavedRun, read_table
from gradshield.data.write import VERDICTS
from gradshield.review.store import Decision
from gradshield.threshold import is_kept

KEPT, QUARANTINED, ASIDE = range(3)
PAGE = 50  # rows of the table at once
SORTS = ("near", "high", "low", "row")
DECIDED = ("undecided", "decided", "moved")


@dataclass(frozen=True)
class RunScores:
    """scores.parquet as arrays [rows]. A text column is an array of codes and the list of texts."""

    score: np.ndarray  # float64, NaN where set aside
    aside: np.ndarray  # bool
    place: list[str]  # file:line
    group: np.ndarray
    groups: list[str]  # the most frequent first
    reason: np.ndarray  # -1 where there is none
    reasons: list[str]
    signals: Mapping[str, np.ndarray]  # what else the scorer says of each row


@dataclass(frozen=True)
class View:
    """The requested part of the table: filters, order and page."""

    q: str = ""
    source: int = 0  # number in Scores.groups, from 1
    verdict: int = 0  # number in VERDICTS, from 1
    reason: int = 0  # number in Scores.reasons, from 1
    decided: str = ""  # one of DECIDED
    sort: str = "near"
    page: int = 1


@dataclass(frozen=True)
class Judged:
    """The verdicts [rows] at a threshold under the decisions that stand, as indices of VERDICTS."""

    threshold: float
    by_score: np.ndarray  # what the score alone says
    verdict: np.ndarray  # what holds: a decision where there is one
    decided: np.ndarray  # bool: a person decided

    def count(self) -> dict[str, int]:
        """Rows of each verdict."""
        return dict(zip(VERDICTS, np.bincount(self.verdict, minlength=3).tolist()))


def read_run_scores(out: Path, rows: int) -> RunScores:
    """The scores of a run of `rows` rows. Raises UserError when its scores.parquet is missing or another's."""
    table = read_table(out)
    missing = {"score", "place", "group", "verdict", "reason"} - set(table.column_names)
    if missing or len(table) != rows:
        file = out / "scores.parquet"
        raise UserError(f"{file}: not the scores of this run ({len(table)} rows, not {rows}); filter again")
    group, groups = _coded(table["group"].to_pylist())
    reason, reasons = _coded(table["reason"].to_pylist())
    return RunScores(
        score=table["score"].to_numpy().astype(np.float64),
        aside=np.array(table["verdict"].to_pylist(), dtype=object) == VERDICTS[ASIDE],
        place=table["place"].to_pylist(),
        group=group,
        groups=groups,
        reason=reason,
        reasons=reasons,
        signals={name: table[name].to_numpy() for name in table.column_names if name not in COLUMNS},
    )


def own_threshold(saved: SavedRun) -> float:
    """The run's own threshold; infinity where it removes nothing."""
    return saved.summary.threshold.limit


def threshold_in_force(saved: SavedRun, decisions: Mapping[int, Decision]) -> float:
    """The threshold that a person set, else the run's own."""
    moved = decisions.get(0)
    return moved.value if moved is not None and moved.value is not None else own_threshold(saved)


def judge(scores: RunScores, threshold: float, decisions: Mapping[int, Decision]) -> Judged:
    """The verdict of every row; those set aside have no score, so nobody can move them."""
    by_score = np.where(scores.aside, ASIDE, np.where(is_kept(scores.score, threshold), KEPT, QUARANTINED))
    verdict, decided = by_score.copy(), np.zeros(len(by_score), dtype=bool)
    for row, decision in decisions.items():
        if row and not scores.aside[row - 1]:
            verdict[row - 1] = VERDICTS.index(decision.verdict)
            decided[row - 1] = True
    return Judged(threshold, by_score, verdict, decided)


def select(scores: RunScores, judged: Judged, view: View, found: np.ndarray | None) -> np.ndarray:
    """Indices of the rows that the view's filters let through, in its order. `found` [rows] is what the search says."""
    keep = np.ones(len(scores.score), dtype=bool) if found is None else found.copy()
    if view.source:
        keep &= scores.group == view.source - 1
    if view.reason:
        keep &= scores.reason == view.reason - 1
    if view.verdict:
        keep &= judged.verdict == view.verdict - 1
    if view.decided == "moved":
        keep &= judged.verdict != judged.by_score
    elif view.decided in DECIDED:
        keep &= judged.decided == (view.decided == "decided")
    rows = np.flatnonzero(keep)
    return rows[np.argsort(_key(scores.score[rows], judged.threshold, view.sort), kind="stable")]


def _key(score: np.ndarray, threshold: float, sort: str) -> np.ndarray:
    """The sort key of the rows, lowest first; rows without a score come last."""
    if sort == "row":
        return np.zeros(len(score))
    if sort == "low":
        return score
    if sort == "near" and np.isfinite(threshold):
        return np.abs(score - threshold)
    return -score


def _coded(values: list[str | None]) -> tuple[np.ndarray, list[str]]:
    names, codes, counts = np.unique(
        np.array(["" if v is None else v for v in values], dtype=object), return_inverse=True, return_counts=True
    )
    order = [n for n in np.argsort(-counts, kind="stable").tolist() if names[n] != ""]
    place = np.full(len(names), -1)
    place[order] = np.arange(len(order))
    return place[codes], [str(names[n]) for n in order]
