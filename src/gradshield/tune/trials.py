"""The trials of one search: each is trained and measured once, and one of them is returned at the end.

`trials/` has one folder per training, `trials.jsonl` one line per trial. All progress is on disk, so a killed run
resumes in its current trial.
"""

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version

import numpy as np

from gradshield.base.errors import Diverged
from gradshield.base.storage import append_line, read_lines, write_text
from gradshield.data.encode import Example
from gradshield.data.run_folder import TRIALS, catch_write_errors
from gradshield.data.summaries import (
    BaseSummary,
    CostSummary,
    GoalSummary,
    TrialSummary,
    TuneSummary,
    read_summary,
)
from gradshield.models.load import parked_on_cpu
from gradshield.threshold import is_kept
from gradshield.tune.card import card
from gradshield.tune.measuring import Goal, Measuring
from gradshield.tune.pool import Pool
from gradshield.tune.search import Outcome, Trial
from gradshield.tune.trainer import Trainer, load_trained


@dataclass(frozen=True)
class Trials:
    """The journal of one search."""

    pool: Pool
    trainer: Trainer
    measuring: Measuring
    goal: Goal
    chosen: dict[int, np.ndarray] = field(default_factory=dict)  # indices of the examples of each trial, by its number

    @property
    def finished(self) -> tuple[TrialSummary, ...]:
        """The trials that the run's folder holds."""
        file = self.pool.out / TRIALS
        return tuple(read_summary(TrialSummary, line, file) for line in read_lines(file))

    def measure(self, trial: Trial, chosen: np.ndarray, given: Sequence[Example] | None = None) -> Trial:
        """Trains on the rows `chosen` and measures, unless the trial is finished. `given` are the examples of these
        rows and those that a defense adds."""
        pool = self.pool
        self.chosen[trial.number] = pool.rows[chosen]
        for saved in self.finished:
            if saved.number == trial.number:
                return Trial(**{name: getattr(saved, name) for name in Trial.__dataclass_fields__})
        start = time.monotonic()
        folder = pool.out / "trials" / f"{trial.number:02d}"
        steps, safety, interval = 0, None, None
        try:
            steps = self.trainer.run(pool.rows[chosen], folder, given)
            with parked_on_cpu(pool.model):
                found = self.measuring.measure(load_trained(pool.settings, folder / "model"), self.goal, folder)
            safety, interval = found.safety, found.utility_interval
            verdict = {"safe": found.safe, "useful": found.useful, "note": found.note}
            trial = replace(trial, asr=found.asr, utility=found.utility, **verdict)
        except Diverged as error:
            steps, trial = error.steps, replace(trial, note=str(error))
        seconds = round(time.monotonic() - start, 1)
        line = TrialSummary(**asdict(trial), steps=steps, safety=safety, utility_interval=interval, seconds=seconds)
        with catch_write_errors(pool.out):
            append_line(pool.out / TRIALS, line.as_dict())
        return trial

    def finish(self, outcome: Outcome) -> TuneSummary:
        """Hands out the accepted trial's model and rows, or keeps the safest model of a rejected search; returns the
        run's summary."""
        pool, goal, chosen = self.pool, self.goal, outcome.accepted or outcome.best
        trials, folder, unseen = self.finished, None, None
        counts: dict[str, int] = {}
        best = next((each for each in trials if chosen and each.number == chosen.number), None)
        if outcome.accepted:
            held, limit = pool.held_out, outcome.accepted.threshold
            held = held if limit is None else held[is_kept(pool.screen[0][held], limit)]
            written = pool.write(pool.out, np.concatenate([self.chosen[outcome.accepted.number], held]))
            counts = {name.replace(" ", "_"): count for name, count in written.items()}
        if best:
            folder = pool.out / ("model" if outcome.accepted else "rejected-model")
            with catch_write_errors(pool.out):
                shutil.rmtree(folder, ignore_errors=True)
                shutil.copytree(pool.out / "trials" / f"{best.number:02d}" / "model", folder)
            if outcome.accepted:
                with parked_on_cpu(pool.model):
                    unseen = self.measuring.unseen(lambda: load_trained(pool.settings, folder))
            with catch_write_errors(pool.out):
                write_text(folder / "README.md", card(self, outcome, best, counts, unseen))
        seconds = goal.base.seconds + sum(each.seconds for each in trials)
        base = {name: getattr(goal.base, name) for name in BaseSummary.model_fields}
        return TuneSummary(
            file=pool.source.path,
            accepted=outcome.accepted.number if outcome.accepted else None,
            reason=outcome.reason,
            rows=pool.encoded.rows,
            **counts,
            held_out=len(pool.held_out),
            base=BaseSummary(**base),
            goal=GoalSummary(max_asr=goal.max_asr, min_utility=goal.min_utility),
            asr=best.asr if best else None,
            utility=best.utility if best else None,
            safety=best.safety if best else None,
            unseen=unseen,
            task=pool.tuning.task,
            model=str(folder) if folder else None,
            cost=CostSummary(
                trials=len(trials),
                steps=sum(each.steps for each in trials),
                scored_tokens=sum(len(e.ids) for e in pool.encoded.examples) if pool.screened else 0,
                safety_evaluations=1 + sum(each.safety is not None for each in trials),
                seconds=round(seconds + (pool.screening.seconds if pool.screened else 0), 1),
            ),
            trials=trials,
            version=version("gradshield"),
        )
