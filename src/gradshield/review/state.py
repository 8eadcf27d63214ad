"""What the page is about: a run's scores and texts, the decisions on it, and a second run to compare it with."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from gradshield.base.errors import UserError
from gradshield.data.run_folder import SavedRun, read_run
from gradshield.report.filter_report import anchor_scores
from gradshield.review import store
from gradshield.review.figures import histogram
from gradshield.review.near_duplicates import Likeness
from gradshield.review.texts import open_texts, search_rows
from gradshield.review.verdicts import RunScores, judge, own_threshold, read_run_scores, threshold_in_force
from gradshield.review.worker import Worker


@dataclass(frozen=True)
class Other:
    """A second run of the same file, as it was when the server started."""

    out: Path
    saved: SavedRun
    scores: RunScores
    verdict: np.ndarray  # [rows], with the decisions that stand there
    threshold: float


class Review:
    """A run under review by one person."""

    def __init__(self, out: Path, other: Path | None, who: str) -> None:
        """Raises UserError when a folder holds no finished run, or the two are of different files."""
        self.out, self.who, self.saved = out, who, read_run(out)
        self.scores = read_run_scores(out, self.saved.summary.rows)
        self.own = own_threshold(self.saved)
        self.by_run = judge(self.scores, self.own, {}).verdict
        self.chart = histogram(self.scores.score, self.own, anchor_scores(out).values())
        self.other = _other(self.saved, out, other) if other else None
        store.open_log(out, self.saved)
        open_texts(out, self.saved)
        self.worker, self.likeness = Worker(out, self.saved), Likeness(out)
        self.search = lru_cache(16)(lambda words: search_rows(out, words, len(self.scores.score)))
        self._standing: tuple[int, dict[int, store.Decision]] = (0, {})

    def decisions(self) -> tuple[int, dict[int, store.Decision]]:
        """(version of the log, the decisions in force)."""
        self._standing = store.changed_since(self.out, *self._standing)
        return self._standing


def _other(saved: SavedRun, out: Path, place: Path) -> Other:
    other = read_run(place)
    if other.input.sha256 != saved.input.sha256:
        raise UserError(f"{place}: a run of another file than {out}, so their rows can't be compared")
    store.check_log(place, other)
    scores, decisions = read_run_scores(place, saved.summary.rows), store.decisions_in_force(place)
    threshold = threshold_in_force(other, decisions)
    return Other(place, other, scores, judge(scores, threshold, decisions).verdict, threshold)
