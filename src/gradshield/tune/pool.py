"""The rows that a search selects from: encoded, some of them held out, and screened when scores are first needed."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from gradshield.base.errors import UserError
from gradshield.base.settings import FilterSettings, FinetuneSettings, TuneSettings
from gradshield.data import Source
from gradshield.data.encode import Example
from gradshield.data.run_folder import read_table
from gradshield.data.summaries import FilterSummary
from gradshield.data.write import write_outputs
from gradshield.defenses.base import Defense, DefenseContext
from gradshield.defenses.registry import find_defense
from gradshield.models.load import Model
from gradshield.scoring.registry import find_scorer
from gradshield.screen.encoding import Encoded, encode_source
from gradshield.screen.filter import run_filter
from gradshield.threshold import Threshold, a1, is_kept
from gradshield.tune.search import leaves_nothing

HELD_OUT, HELD_OUT_ROWS = "held-out", 50
TRAINING_COST = 5.0  # forward passes that training once on a token costs (docs/performance.md)


@dataclass(frozen=True)
class Pool:
    """The rows of one run. Expensive parts are computed when they are first needed, and kept on disk."""

    out: Path
    source: Source
    layout: str
    model: Model
    settings: FilterSettings
    training: FinetuneSettings
    tuning: TuneSettings

    @cached_property
    def encoded(self) -> Encoded:
        needs = find_scorer(self.settings.scorer)[0].needs
        return encode_source(self.source, self.layout, self.model, self.settings, needs)

    @cached_property
    def screening(self) -> FilterSummary:
        """The summary of the filter's run in `screen/`."""
        return run_filter(self.source, self.out / "screen", self.settings, self.model)

    @cached_property
    def screen(self) -> tuple[np.ndarray, Threshold]:
        """Scores of the examples, and the threshold. What got no finite score is set aside, and inf here."""
        found = self.screening.threshold
        table = read_table(self.out / "screen", ["score", "reason"]).to_pydict()
        values = np.array([table["score"][e.row] for e in self.encoded.examples], dtype=float)
        for n in np.flatnonzero(~np.isfinite(values)):
            row = self.encoded.examples[int(n)].row
            self.encoded.reasons[row] = table["reason"][row]
        return np.where(np.isfinite(values), values, np.inf), Threshold(**{**dict(found), "value": found.limit})

    @cached_property
    def held_out(self) -> np.ndarray:
        """Indices of the examples that are left out of every training to measure utility on them.

        They are drawn from the rows that the screening keeps, so that a model need not be good at harmful rows to be
        useful. They are drawn from all rows if nothing is scored yet, or if the screening would keep almost none:
        `search` believes that only after a training.
        """
        if self.tuning.task != HELD_OUT:
            return np.array([], dtype=int)
        kept, which = np.arange(len(self.encoded.examples)), "the file has"
        if self.screens_first:
            values, threshold = self.screen
            nothing = leaves_nothing(threshold, values, self.tuning.step)
            kept = np.flatnonzero(np.isfinite(values) if nothing else is_kept(values, threshold.value))
            which = "the file has" if nothing else "the screening keeps"
        count = min(HELD_OUT_ROWS, len(kept) // 5)
        if not count:
            raise UserError(f"{self.source.path}: {which} too few rows to hold any out (5 are needed): name a --task")
        return np.sort(np.random.default_rng(self.training.seed).choice(kept, count, replace=False))

    @cached_property
    def rows(self) -> np.ndarray:
        """Indices of the examples that can be trained on; ranks and trials speak of these."""
        usable = np.ones(len(self.encoded.examples), dtype=bool)
        if self.screens_first:  # else nothing is scored before the first trial
            usable = np.isfinite(self.screen[0])
        usable[self.held_out] = False
        return np.flatnonzero(usable)

    @property
    def scores(self) -> np.ndarray:
        return self.screen[0][self.rows]

    def guess(self, in_play: np.ndarray, number: int) -> Threshold:
        """The threshold of the screening at first. Later guesses are asked for when it was not enough: A1 on what is
        left."""
        return self.screen[1] if number == 0 else a1(in_play, self.settings.alpha)

    @cached_property
    def defense(self) -> Defense:
        return find_defense(self.tuning.defense)[0]

    def defended(self) -> Sequence[Example]:
        """The rows that the defense trains on: some of those that can be trained on, and what it adds."""
        scores = None
        if "screening" in self.defense.needs:
            scores = np.full(self.encoded.rows, np.nan)
            scores[[e.row for e in self.encoded.examples]] = self.screen[0]
        context = DefenseContext(
            self.model, self.settings, self.training, None if scores is None else (scores, self.screen[1])
        )
        rows = [self.encoded.examples[n] for n in self.rows]
        return self.defense.rows(context, find_defense(self.tuning.defense)[1], rows)

    @property
    def screens_first(self) -> bool:
        """Whether to score first: the start that is likely cheaper if half of all files are poisoned.

        Screening first costs a scoring and a training, the paper's start a training, and in the other half of cases
        both again: so it pays to score first wherever that costs less than a training.
        """
        if "search" not in self.defense.needs:
            return "screening" in self.defense.needs
        scoring = find_scorer(self.settings.scorer)[0].cost
        return self.tuning.start == "screen" or (
            self.tuning.start == "auto" and scoring < TRAINING_COST * self.training.epochs
        )

    @property
    def screened(self) -> bool:
        """True once the rows were scored."""
        return "screening" in self.__dict__

    @property
    def held_out_examples(self) -> list[Example]:
        """The examples that are left out of every training."""
        return [self.encoded.examples[n] for n in self.held_out]

    def write(self, folder: Path, kept: np.ndarray) -> dict[str, int]:
        """Writes the rows' files into the folder, those of the examples `kept` (indices) as kept; returns the counts of
        verdicts."""
        verdicts = ["quarantined"] * self.encoded.rows
        for n in kept.tolist():
            verdicts[self.encoded.examples[n].row] = "kept"
        for row in self.encoded.reasons:
            verdicts[row] = "set aside"
        return write_outputs(self.source, verdicts, self.encoded.reasons, folder)
