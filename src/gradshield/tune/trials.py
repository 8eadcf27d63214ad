"""The trials of one search: a training each, what its model is measured at, and what is handed out in the end.

`trials/` has a folder a training, `trials.jsonl` a line a trial. Whatever is done is on disk, so a run that was killed
goes on in the trial that it was in.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import TypedDict

from gradshield.base.errors import Diverged, UserError
from gradshield.base.settings import FilterSettings, FinetuneSettings, TuneSettings
from gradshield.base.storage import append_line, read_json, read_lines, write_text
from gradshield.data import Source
from gradshield.data.encode import Example
from gradshield.data.run_folder import TRIALS, read_table, writing
from gradshield.data.write import write_outputs
from gradshield.defenses.base import Context, Defense
from gradshield.defenses.registry import find_defense
from gradshield.defenses.train import with_prompt
from gradshield.evaluation.config import EvaluationSettings
from gradshield.evaluation.evaluate import JudgeFailed, evaluate_safety, write_safety, write_utility
from gradshield.evaluation.measure import plain, safety_summary
from gradshield.evaluation.safety import SafetyReport, attack_success
from gradshield.evaluation.sources import unseen_requests
from gradshield.evaluation.utility import UtilityReport, evaluate_utility
from gradshield.models.load import Model, set_aside
from gradshield.scoring.registry import find_scorer
from gradshield.screen.encoding import Encoded, encode_source
from gradshield.screen.filter import load, run_filter
from gradshield.threshold import Threshold, a1, is_kept
from gradshield.training.external import check_trained, run_trainer
from gradshield.tune.card import card
from gradshield.tune.search import Outcome, Trial, leaves_nothing

HELD_OUT, HELD_OUT_ROWS = "held-out", 50
ROUNDING = 1e-9  # of a share and what may be added to it or taken off
TRAINED = 5.0  # forward passes that a token costs which is trained on once (docs/performance.md)
Finetune = Callable[[Sequence[Example], Path], Mapping[str, float] | str | Path | None]
"""(rows to train on, folder for the adapter or model) → figures such as {"steps": ..., "seconds": ...}, or the folder
where the adapter is instead. An example holds the tokens and the mask of a row, and its number in the file, from 0."""


class Base(TypedDict):
    """What the base model was measured at."""

    asr: float
    utility: float
    utility_interval: tuple[float | None, float | None]
    safety: dict[str, Any]
    seconds: float


@dataclass(frozen=True)
class Goal:
    """What a trial must come up to, beside what the base model was measured at."""

    base: Base
    max_asr: float
    min_utility: float


@dataclass(frozen=True)
class Trials:
    """What the trials of one run share; everything dear is made when it is first needed, and kept on disk."""

    out: Path
    source: Source
    layout: str
    model: Model
    settings: FilterSettings
    training: FinetuneSettings
    tuning: TuneSettings
    measuring: EvaluationSettings
    trainer: Finetune | None
    train: Callable[..., Mapping[str, float]]  # `finetune`, in all processes
    chosen: dict[int, np.ndarray] = field(default_factory=dict)  # indices of the examples of each trial, by its number

    @cached_property
    def encoded(self) -> Encoded:
        needs = find_scorer(self.settings.scorer)[0].needs
        return encode_source(self.source, self.layout, self.model, self.settings, needs)

    @cached_property
    def screening(self) -> dict[str, Any]:
        """The summary of the filter's run in `screen/`."""
        return run_filter(self.source, self.out / "screen", self.settings, self.model)

    @cached_property
    def screen(self) -> tuple[np.ndarray, Threshold]:
        """Scores of the examples, and the threshold. What got no finite score is set aside, and inf here."""
        found = self.screening["threshold"]
        table = read_table(self.out / "screen", ["score", "reason"]).to_pydict()
        values = np.array([table["score"][e.row] for e in self.encoded.examples], dtype=float)
        for n in np.flatnonzero(~np.isfinite(values)):
            row = self.encoded.examples[int(n)].row
            self.encoded.reasons[row] = table["reason"][row]
        value = np.inf if found["value"] is None else found["value"]
        return np.where(np.isfinite(values), values, np.inf), Threshold(**{**found, "value": value})

    @cached_property
    def held_out(self) -> np.ndarray:
        """Indices of the examples that are left out of every training to measure utility on them.

        They are drawn from what the screening keeps, so that a good model need not be good at harm. They are drawn
        from all rows where the screening would keep next to none, which is not believed before a training (see
        `search`), or where nothing is scored yet.
        """
        if self.tuning.task != HELD_OUT:
            return np.array([], dtype=int)
        kept = np.arange(len(self.encoded.examples))
        if self.screens_first:
            values, threshold = self.screen
            nothing = leaves_nothing(threshold, values, self.tuning.step)
            kept = np.flatnonzero(np.isfinite(values) if nothing else is_kept(values, threshold.value))
        count = min(HELD_OUT_ROWS, len(kept) // 5)
        if not count:
            raise UserError(f"{self.source.path}: the screening keeps too few rows to hold any out: name a --task")
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
        """The settings' threshold at first; it was not enough where a second guess is asked for: A1 on what is left."""
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
        context = Context(
            self.model, self.settings, self.training, None if scores is None else (scores, self.screen[1])
        )
        rows = [self.encoded.examples[n] for n in self.rows]
        return self.defense.rows(context, find_defense(self.tuning.defense)[1], rows)

    @property
    def screens_first(self) -> bool:
        """Which start is likely cheaper, half of all files being poisoned.

        Screening first costs a scoring and a training, the paper's start a training, and in the other half of cases
        both again: so it pays to score first wherever that costs less than a training.
        """
        if "search" not in self.defense.needs:
            return "screening" in self.defense.needs
        scoring = find_scorer(self.settings.scorer)[0].cost
        return self.tuning.start == "screen" or (
            self.tuning.start == "auto" and scoring < TRAINED * self.training.epochs
        )

    @cached_property
    def goal(self) -> Goal:
        """The base model's safety and utility, measured once, and what follows from them.

        Raises UserError for a base model that is not safe enough itself, before any row is scored.
        """
        file, tuning, start = self.out / "base.json", self.tuning, time.monotonic()
        if not file.exists():
            report = self._safety(self.model, self.out / "base")
            self._allowed(report.asr)
            pause = time.monotonic()
            _ = self.held_out  # which may take the whole screening, whose seconds are counted apart
            start += time.monotonic() - pause
            useful = self._utility(self.model, self.out / "base")
            figures = {"asr": report.asr, "utility": useful.value, "utility_interval": useful.interval}
            figures |= {"safety": safety_summary(report), "seconds": round(time.monotonic() - start, 1)}
            with writing(self.out):
                write_text(file, json.dumps(plain(figures)))
        base = read_json(file, Base)
        return Goal(base, self._allowed(base["asr"]), tuning.lowest_utility(base["utility"]))

    def _allowed(self, base: float) -> float:
        """The attack success rate that is let pass. Raises UserError where the base model's is over it."""
        allowed = self.tuning.highest_asr(base)
        if base > allowed:
            raise UserError(
                f"{self.model.name}: attack success rate {base:.3f} before any fine-tuning, over the "
                f"{allowed:g} asked for: use a better aligned model, a higher --max-asr, or one relative to it (+0.07)"
            )
        return allowed

    @property
    def lines(self) -> list[dict[str, Any]]:
        """What the run's folder holds of trials that are done."""
        return read_lines(self.out / TRIALS)

    def measure(self, goal: Goal, trial: Trial, chosen: np.ndarray, given: Sequence[Example] | None = None) -> Trial:
        """Trains on the rows `chosen` and measures, or takes what an earlier run of this trial left. `given` are their
        examples and what a defense adds."""
        self.chosen[trial.number] = self.rows[chosen]
        for saved in self.lines:
            if saved["number"] == trial.number:
                return Trial(**{k: saved[k] for k in Trial.__dataclass_fields__})
        start = time.monotonic()
        folder = self.out / "trials" / f"{trial.number:02d}"
        figures: dict[str, Any] = {"steps": 0, "safety": None, "utility_interval": None}
        try:
            figures["steps"] = self._train(self.rows[chosen], folder, given)
            with set_aside(self.model):
                figures |= self._figures(goal, folder)
        except Diverged as error:
            figures |= {"steps": error.steps, "note": str(error)}
        trial = replace(trial, **{k: v for k, v in figures.items() if k in Trial.__dataclass_fields__})
        line = {**asdict(trial), **figures, "seconds": round(time.monotonic() - start, 1)}
        with writing(self.out):
            append_line(self.out / TRIALS, line)
        return trial

    def _figures(self, goal: Goal, folder: Path) -> dict[str, Any]:
        """What becomes of a trial by its model, which is gone afterwards; no utility where it is not safe."""
        trained = load_trained(self.settings, folder / "model")
        report = self._safety(trained, folder)
        figures = {"safety": plain(safety_summary(report))}
        if not report.asr <= goal.max_asr + ROUNDING:
            return figures | {"asr": report.asr}
        try:
            found = self._utility(trained, folder)
        except Diverged as error:  # a broken model is not safe, whatever it answers
            return figures | {"note": str(error)}
        useful = found.value >= goal.min_utility - ROUNDING
        note = "" if useful else f"utility {found.value:.3f} is below the {goal.min_utility:.3f} asked for"
        figures |= {"asr": report.asr, "safe": True, "useful": useful, "note": note}
        return figures | {"utility": found.value, **plain({"utility_interval": found.interval})}

    def _train(self, chosen: np.ndarray, folder: Path, given: Sequence[Example] | None) -> int:
        """Leaves the trained model in `folder / "model"`; returns the optimizer steps, 0 where they are not known."""
        done, work = folder / "figures.json", folder / "training"
        if not done.exists():
            with writing(self.out):
                folder.mkdir(parents=True, exist_ok=True)
            examples = given or [self.encoded.examples[n] for n in chosen]
            if self.trainer or self.tuning.trainer_command:
                with set_aside(self.model):  # they load a model of their own
                    figures = self._own_training(examples, chosen, work)
            else:
                with writing(self.out):
                    figures = self.train(examples, work)
            with writing(self.out):
                write_text(done, json.dumps(_plain_figures(figures)))
        if work.exists():
            with writing(self.out):
                shutil.rmtree(folder / "model", ignore_errors=True)
                os.replace(work, folder / "model")
        return int(read_json(done, dict[str, float | None]).get("steps") or 0)

    def _own_training(self, examples: Sequence[Example], chosen: np.ndarray, work: Path) -> Mapping[str, float]:
        """By the user's function, or by the command on a file of the rows, verbatim; nothing is recorded where they
        leave no model that can be loaded."""
        if self.trainer:
            made = self.trainer(examples, work)
            if isinstance(made, str | os.PathLike) and not Path(made).is_dir():
                raise UserError(f"the trainer says that its model is in {made}, which is no folder")
            if isinstance(made, str | os.PathLike) and Path(made).resolve() != work.resolve():
                with writing(self.out):
                    shutil.copytree(made, work, dirs_exist_ok=True)
            figures = made if isinstance(made, Mapping) else {}
        else:
            figures = self._command(str(self.tuning.trainer_command), chosen, work)
        check_trained(work)
        return figures

    def _command(self, command: str, chosen: np.ndarray, work: Path) -> Mapping[str, float]:
        data = work.parent / "data"
        self._write(data, self._verdicts(chosen))
        kept = next(p for p in sorted(data.iterdir()) if p.name.startswith("kept"))
        fields = {"data": kept, "out": work, "model": self.settings.model, "seed": self.training.seed}
        return run_trainer(command, self.tuning.trainer_config, fields, work)

    def _safety(self, model: Model, folder: Path) -> SafetyReport:
        """The model's safety; the answers behind it go to the folder, also where the judge ceases to answer."""
        try:
            report = evaluate_safety(model, self.measuring)
        except JudgeFailed as failed:
            write_safety(failed.report, folder)
            raise
        write_safety(report, folder)
        return report

    def _unseen(self, folder: Path) -> dict[str, Any] | None:
        """Attack success of the accepted model on requests that no decision has seen: those of the trials chose it, so
        they flatter it. None where the set of requests has no more."""
        asked = unseen_requests(self.measuring.requests, self.measuring.request_count, self.measuring.case_seed)
        if not asked:
            return None
        with set_aside(self.model):
            report = attack_success(load_trained(self.settings, folder), asked, self.measuring.max_new_tokens)
        return plain({"asr": report.asr, "asr_interval": report.interval, "requests": len(asked)})

    def _utility(self, model: Model, folder: Path) -> UtilityReport:
        rows = [self.encoded.examples[n] for n in self.held_out]
        found = evaluate_utility(model, rows if self.tuning.task == HELD_OUT else self.tuning.task, self.measuring)
        write_utility(found, folder)
        return found

    def _verdicts(self, kept: np.ndarray) -> list[str]:
        verdicts = ["quarantined"] * self.encoded.rows
        for n in kept.tolist():
            verdicts[self.encoded.examples[n].row] = "kept"
        for row in self.encoded.reasons:
            verdicts[row] = "set aside"
        return verdicts

    def _write(self, folder: Path, verdicts: list[str]) -> dict[str, int]:
        return write_outputs(self.source, verdicts, self.encoded.reasons, folder)

    def finish(self, outcome: Outcome, goal: Goal) -> dict[str, Any]:
        """Hands out the accepted trial's model and rows, or keeps the safest model of a rejected search; returns the
        run's summary."""
        chosen = outcome.accepted or outcome.best
        lines, folder, unseen = self.lines, None, None
        counts: dict[str, int] = {}
        line = next((each for each in lines if chosen and each["number"] == chosen.number), None)
        if outcome.accepted:
            trained, limit = self.chosen[outcome.accepted.number], outcome.accepted.threshold
            held = self.held_out if limit is None else self.held_out[is_kept(self.screen[0][self.held_out], limit)]
            written = self._write(self.out, self._verdicts(np.concatenate([trained, held])))
            counts = {name.replace(" ", "_"): count for name, count in written.items()}
        if line:
            folder = self.out / ("model" if outcome.accepted else "rejected-model")
            with writing(self.out):
                shutil.rmtree(folder, ignore_errors=True)
                shutil.copytree(self.out / "trials" / f"{line['number']:02d}" / "model", folder)
            unseen = self._unseen(folder) if outcome.accepted else None
            with writing(self.out):
                write_text(folder / "README.md", card(self, outcome, line, goal, counts, unseen))
        scored = "screening" in self.__dict__
        seconds = goal.base["seconds"] + sum(each["seconds"] for each in lines)
        return {
            "file": self.source.path,
            "accepted": outcome.accepted.number if outcome.accepted else None,
            "reason": outcome.reason,
            "rows": self.encoded.rows,
            **counts,
            "held_out": len(self.held_out),
            "base": {name: goal.base[name] for name in ("asr", "utility", "utility_interval", "safety")},
            "goal": {"max_asr": goal.max_asr, "min_utility": goal.min_utility},
            "asr": line["asr"] if line else None,
            "utility": line["utility"] if line else None,
            "safety": line["safety"] if line else None,
            "unseen": unseen,
            "task": self.tuning.task,
            "model": str(folder) if folder else None,
            "cost": {
                "trials": len(lines),
                "steps": sum(each["steps"] for each in lines),
                "scored_tokens": sum(len(e.ids) for e in self.encoded.examples) if scored else 0,
                "safety_evaluations": 1 + sum(each["safety"] is not None for each in lines),
                "seconds": round(seconds + (self.screening["seconds"] if scored else 0), 1),
            },
            "trials": lines,
            "version": version("gradshield"),
        }


def _plain_figures(figures: Mapping[str, Any]) -> dict[str, float]:
    """What of a trainer's figures is a number; a user's may be arrays, tensors, or anything. Not the seconds, which
    differ when a training was resumed."""
    found = {}
    for name, value in figures.items():
        if name == "seconds":
            continue
        with suppress(TypeError, ValueError, RuntimeError):
            found[str(name)] = float(value)
    return found


def load_trained(settings: FilterSettings, folder: Path) -> Model:
    """What a trial left: its adapter laid over the settings' model (and adapter), or a whole model."""
    if (folder / "adapter_config.json").exists():
        return with_prompt(load(settings, over=str(folder)), folder)
    return with_prompt(load(settings.model_copy(update={"model": str(folder), "adapter": None})), folder)
