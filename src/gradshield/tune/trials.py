"""The trials of one search: each trained and measured once, and what is handed out in the end.

`trials/` has a folder a training, `trials.jsonl` a line a trial. Whatever is done is on disk, so a run that was killed
resumes in the trial that it was in.
"""

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from typing import Any

import numpy as np

from gradshield.base.errors import Diverged
from gradshield.base.storage import append_line, read_lines, write_text
from gradshield.data.encode import Example
from gradshield.data.run_folder import TRIALS, catch_write_errors
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
    def lines(self) -> list[dict[str, Any]]:
        """What the run's folder holds of trials that are done."""
        return read_lines(self.pool.out / TRIALS)

    def measure(self, trial: Trial, chosen: np.ndarray, given: Sequence[Example] | None = None) -> Trial:
        """Trains on the rows `chosen` and measures, or takes what an earlier run of this trial left. `given` are their
        examples and what a defense adds."""
        pool = self.pool
        self.chosen[trial.number] = pool.rows[chosen]
        for saved in self.lines:
            if saved["number"] == trial.number:
                return Trial(**{k: saved[k] for k in Trial.__dataclass_fields__})
        start = time.monotonic()
        folder = pool.out / "trials" / f"{trial.number:02d}"
        figures: dict[str, Any] = {"steps": 0, "safety": None, "utility_interval": None}
        try:
            figures["steps"] = self.trainer.run(pool.rows[chosen], folder, given)
            with parked_on_cpu(pool.model):
                figures |= self.measuring.figures(load_trained(pool.settings, folder / "model"), self.goal, folder)
        except Diverged as error:
            figures |= {"steps": error.steps, "note": str(error)}
        trial = replace(trial, **{k: v for k, v in figures.items() if k in Trial.__dataclass_fields__})
        line = {**asdict(trial), **figures, "seconds": round(time.monotonic() - start, 1)}
        with catch_write_errors(pool.out):
            append_line(pool.out / TRIALS, line)
        return trial

    def finish(self, outcome: Outcome) -> dict[str, Any]:
        """Hands out the accepted trial's model and rows, or keeps the safest model of a rejected search; returns the
        run's summary."""
        pool, goal, chosen = self.pool, self.goal, outcome.accepted or outcome.best
        lines, folder, unseen = self.lines, None, None
        counts: dict[str, int] = {}
        line = next((each for each in lines if chosen and each["number"] == chosen.number), None)
        if outcome.accepted:
            held, limit = pool.held_out, outcome.accepted.threshold
            held = held if limit is None else held[is_kept(pool.screen[0][held], limit)]
            written = pool.write(pool.out, np.concatenate([self.chosen[outcome.accepted.number], held]))
            counts = {name.replace(" ", "_"): count for name, count in written.items()}
        if line:
            folder = pool.out / ("model" if outcome.accepted else "rejected-model")
            with catch_write_errors(pool.out):
                shutil.rmtree(folder, ignore_errors=True)
                shutil.copytree(pool.out / "trials" / f"{line['number']:02d}" / "model", folder)
            if outcome.accepted:
                with parked_on_cpu(pool.model):
                    unseen = self.measuring.unseen(lambda: load_trained(pool.settings, folder))
            with catch_write_errors(pool.out):
                write_text(folder / "README.md", card(self, outcome, line, counts, unseen))
        seconds = goal.base["seconds"] + sum(each["seconds"] for each in lines)
        return {
            "file": pool.source.path,
            "accepted": outcome.accepted.number if outcome.accepted else None,
            "reason": outcome.reason,
            "rows": pool.encoded.rows,
            **counts,
            "held_out": len(pool.held_out),
            "base": {name: goal.base[name] for name in ("asr", "utility", "utility_interval", "safety")},
            "goal": {"max_asr": goal.max_asr, "min_utility": goal.min_utility},
            "asr": line["asr"] if line else None,
            "utility": line["utility"] if line else None,
            "safety": line["safety"] if line else None,
            "unseen": unseen,
            "task": pool.tuning.task,
            "model": str(folder) if folder else None,
            "cost": {
                "trials": len(lines),
                "steps": sum(each["steps"] for each in lines),
                "scored_tokens": sum(len(e.ids) for e in pool.encoded.examples) if pool.screened else 0,
                "safety_evaluations": 1 + sum(each["safety"] is not None for each in lines),
                "seconds": round(seconds + (pool.screening.seconds if pool.screened else 0), 1),
            },
            "trials": lines,
            "version": version("gradshield"),
        }
