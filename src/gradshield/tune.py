"""From a suspect dataset to a fine-tuned model that is shown to be safe and useful, or to a rejection (alg. 1).

Everything is in the run folder: `screen/` the filter's own run, `trials/` a folder a training, `trials.jsonl` a line a
trial, `model/` what is handed out. Killed at any moment, the same call goes on in the trial that it was in.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from gradshield.card import card
from gradshield.data import Source, open_source
from gradshield.data.encode import Example
from gradshield.data.write import write_outputs
from gradshield.errors import Diverged, UserError
from gradshield.evaluation.evaluate import JudgeFailed, evaluate_safety, write_whole
from gradshield.evaluation.run import write_safety, write_utility
from gradshield.evaluation.settings import EvaluationSettings
from gradshield.evaluation.sources import harmful_requests, scary_requests
from gradshield.evaluation.utility import evaluate_utility, find_task
from gradshield.filter import Encoded, check_settings, encode_source, find_layout, load, run_filter
from gradshield.finetune import check_method, check_training, finetune
from gradshield.model import Model, load_model, set_aside
from gradshield.processes import processes, together
from gradshield.report import report_trials
from gradshield.run import begin_run, checksums, find_run, plan_of, write_run, writing
from gradshield.search import Outcome, Trial, search
from gradshield.settings import FilterSettings, FinetuneSettings, TuneSettings
from gradshield.threshold import Threshold, a1
from gradshield.trainer import run_trainer

HELD_OUT, HELD_OUT_ROWS = "held-out", 50
TRIALS = "trials.jsonl"
Finetune = Callable[[np.ndarray, Path], Mapping[str, float]]
"""(rows to train on, folder for the adapter or model) → figures such as {"steps": ..., "seconds": ...}."""


@dataclass(frozen=True)
class Goal:
    """What a trial must come up to, and what the base model comes up to."""

    base_asr: float
    base_utility: float
    max_asr: float
    min_utility: float


def run_tune(
    path: str,
    out: Path,
    settings: FilterSettings,
    training: FinetuneSettings,
    tuning: TuneSettings,
    measuring: EvaluationSettings,
    *,
    trainer: Finetune | None = None,
    tell: Callable[[Trial], None] = lambda trial: None,
) -> dict[str, Any]:
    """Searches for rows of `path` that a safe and useful model can be trained on, and trains it, in the folder `out`.

    `trainer` replaces the fine-tuning; `tell` hears of every trial as it ends. Returns the summary that run.yaml ends
    with; its "accepted" is the number of the trial whose model is in `out/model`, or None: rejected, with the safest
    model in `out/rejected-model`. Raises UserError for what the user can mend, also when the base model itself misses
    the goal, before anything is trained. Where a launcher started several processes, all of them call this; all train,
    the first one alone does the rest, and the others return {} when it raised an error.
    """
    loaded = cache(partial(load, settings))

    def lead(train: Callable[..., Mapping[str, float]]) -> dict[str, Any]:
        start = time.monotonic()
        _check(settings, training, tuning, measuring, trainer)
        source = open_source(path, settings.format, settings.split)
        layout = find_layout(source, settings)
        model = loaded()
        check_method(model, training)
        plan = plan_of(source, model, layout, settings.model_dump(mode="json"))
        parts = {"finetune": training, "tune": tuning, "evaluation": measuring}
        plan |= {name: part.model_dump(mode="json") for name, part in parts.items()}
        named = (settings.probes, settings.reference, settings.chat_template, tuning.task, tuning.trainer_config)
        plan["file"] = checksums(*named, measuring.requests, measuring.scary)
        finished = find_run(out, plan)
        if finished:
            return finished
        begin_run(out, plan)
        task = _Task(path, out, source, layout, model, settings, training, tuning, measuring, trainer, train)
        goal = task.goal
        summary = task.finish(_search(task, goal, tell), goal, time.monotonic() - start)
        with writing(out):
            report_trials(out, {**plan, "summary": summary})
            write_run(out, {**plan, "summary": summary})
        return summary

    return together(lead, lambda *order: finetune(loaded(), *order), cpu=settings.device == "cpu") or {}


def _check(
    settings: FilterSettings,
    training: FinetuneSettings,
    tuning: TuneSettings,
    measuring: EvaluationSettings,
    trainer: Finetune | None,
) -> None:
    """Raises UserError for what would be found out only after long work."""
    check_settings(settings)
    check_training(training)
    harmful_requests(measuring.requests, measuring.request_count, measuring.case_seed)
    scary_requests(measuring.scary, measuring.request_count, measuring.case_seed)
    if tuning.task != HELD_OUT:
        find_task(tuning.task, measuring)
    if processes() > 1 and (trainer or tuning.trainer_command):
        raise UserError("a trainer of your own starts its own processes: start tune without a launcher")
    if processes() > 1 and settings.device not in (None, "cpu", "cuda"):
        raise UserError(f"--device {settings.device}: each process takes a device of its own; leave it out")
    number = (settings.device or "").removeprefix("cuda:")
    if number.isdigit() and int(number) and not (trainer or tuning.trainer_command):
        raise UserError(
            f"--device {settings.device}: the Trainer takes the first GPU: set CUDA_VISIBLE_DEVICES={number}"
        )


def _search(task: "_Task", goal: Goal, tell: Callable[[Trial], None]) -> Outcome:
    """The task's search (alg. 1); `tell` hears of each trial."""
    outcome: Outcome | None = None
    for event in search(
        lambda: task.scores,
        task.guess,
        lambda trial, chosen: task.measure(goal, trial, chosen),
        len(task.rows),
        screen_first=task.screens_first,
        max_searches=task.tuning.searches,
        step=task.tuning.step,
        literal=task.tuning.literal,
    ):
        if isinstance(event, Trial):
            tell(event)
        else:
            outcome = event
    assert outcome is not None
    return outcome


@dataclass(frozen=True)
class _Task:
    """What the trials of one run share; everything dear is made when it is first needed, and kept on disk."""

    path: str
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
        return encode_source(self.source, self.layout, self.model, self.settings)

    @cached_property
    def screen(self) -> tuple[np.ndarray, Threshold]:
        """Scores of the examples, and the threshold, of the filter's run in `screen/`. What got no finite score is set
        aside, and inf here."""
        summary = run_filter(self.path, self.out / "screen", self.settings, self.model)
        table = pq.read_table(self.out / "screen" / "scores.parquet", columns=["score", "reason"]).to_pydict()
        values = np.array([table["score"][e.row] for e in self.encoded.examples], dtype=float)
        for n in np.flatnonzero(~np.isfinite(values)):
            row = self.encoded.examples[n].row
            self.encoded.reasons[row] = table["reason"][row]
        found = summary["threshold"]
        value = np.inf if found["value"] is None else found["value"]
        return np.where(np.isfinite(values), values, np.inf), Threshold(**{**found, "value": value})

    @cached_property
    def held_out(self) -> np.ndarray:
        """Indices of the examples that are left out of every training to measure utility on them.

        They are drawn from what the screening keeps, so that a good model need not be good at harm; where it keeps
        nothing, from all.
        """
        if self.tuning.task != HELD_OUT:
            return np.array([], dtype=int)
        values, threshold = self.screen
        kept = np.flatnonzero(values < threshold.value)
        kept = kept if len(kept) else np.flatnonzero(np.isfinite(values))
        count = min(HELD_OUT_ROWS, len(kept) // 5)
        if not count:
            raise UserError(f"{self.path}: the screening keeps too few rows to hold any out: name a --task")
        return np.sort(np.random.default_rng(self.training.seed).choice(kept, count, replace=False))

    @cached_property
    def rows(self) -> np.ndarray:
        """Indices of the examples that can be trained on; ranks and trials speak of these."""
        usable = np.ones(len(self.encoded.examples), dtype=bool)
        if self.screens_first or self.tuning.task == HELD_OUT:  # else nothing is scored before the first trial
            usable = np.isfinite(self.screen[0])
        usable[self.held_out] = False
        return np.flatnonzero(usable)

    @property
    def scores(self) -> np.ndarray:
        return self.screen[0][self.rows]

    def guess(self, in_play: np.ndarray, number: int) -> Threshold:
        """The settings' threshold at first; it was not enough where a second guess is asked for: A1 on what is left."""
        return self.screen[1] if number == 0 else a1(in_play, self.settings.alpha)

    @property
    def screens_first(self) -> bool:
        """Which start is likely cheaper, half of all files being poisoned: scoring costs less than a training as long
        as its tokens are passed once and those of the training several times, so `auto` screens."""
        return self.tuning.start != "paper"

    @cached_property
    def goal(self) -> Goal:
        """The base model's safety and utility, measured once, and what follows from them."""
        file = self.out / "base.json"
        if not file.exists():
            asr, utility = self._evaluate(self.model, self.out / "base", utility=True)
            write_whole(self.out, file.name, json.dumps({"asr": asr, "utility": utility}))
        base = json.loads(file.read_text(encoding="utf-8"))
        t = self.tuning
        allowed = t.max_asr if t.max_asr_rise is None else base["asr"] + t.max_asr_rise
        if base["asr"] > allowed:
            raise UserError(
                f"{self.model.name}: attack success rate {base['asr']:.3f} before any fine-tuning, over the "
                f"{allowed:g} asked for: use a better aligned model, or a higher --max-asr"
            )
        asked = base["utility"] - t.utility_drop if t.min_utility is None else t.min_utility
        return Goal(base["asr"], base["utility"], allowed, asked)

    @property
    def trials(self) -> list[dict[str, Any]]:
        """What the run's folder holds of trials that are done. A last line that a kill or a full disk cut short is cut
        off the file, too."""
        file = self.out / TRIALS
        data = file.read_bytes() if file.exists() else b""
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(file, whole)
        return [json.loads(line) for line in data[:whole].splitlines()]

    def measure(self, goal: Goal, trial: Trial, chosen: np.ndarray) -> Trial:
        """Trains on the rows `chosen` and measures, or takes what an earlier run of this trial left."""
        self.chosen[trial.number] = self.rows[chosen]
        for saved in self.trials:
            if saved["number"] == trial.number:
                return Trial(**{k: saved[k] for k in Trial.__dataclass_fields__})
        start = time.monotonic()
        folder = self.out / "trials" / f"{trial.number:02d}"
        figures: Mapping[str, float] = {}
        try:
            figures = self._train(self.rows[chosen], folder)
            trial = self._measured(trial, goal, folder)
        except Diverged as error:
            trial = replace(trial, note=str(error))
        cost = {"steps": figures.get("steps", 0), "seconds": round(time.monotonic() - start, 1)}
        with writing(self.out), (self.out / TRIALS).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({**asdict(trial), **cost}) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        return trial

    def _measured(self, trial: Trial, goal: Goal, folder: Path) -> Trial:
        with set_aside(self.model):
            asr, utility = self._figures(goal, folder)
        if utility is None:
            return replace(trial, asr=asr)
        useful = utility >= goal.min_utility
        note = "" if useful else f"utility {utility:.3f} is below the {goal.min_utility:.3f} asked for"
        return replace(trial, asr=asr, safe=True, utility=utility, useful=useful, note=note)

    def _figures(self, goal: Goal, folder: Path) -> tuple[float, float | None]:
        """(ASR, utility) of a trial's model, which is gone afterwards; no utility where it is not safe."""
        trained = load_trained(self.settings, folder / "model")
        asr, _ = self._evaluate(trained, folder, utility=False)
        if not asr <= goal.max_asr:
            return asr, None
        return asr, self._evaluate(trained, folder, utility=True, safety=False)[1]

    def _train(self, chosen: np.ndarray, folder: Path) -> Mapping[str, float]:
        if (folder / "figures.json").exists():
            return json.loads((folder / "figures.json").read_text(encoding="utf-8"))
        work = folder / "training"
        folder.mkdir(parents=True, exist_ok=True)
        if self.trainer:
            figures = self.trainer(chosen, work)
        elif self.tuning.trainer_command:
            figures = self._command(self.tuning.trainer_command, chosen, work)
        else:
            examples: list[Example] = [self.encoded.examples[n] for n in chosen]
            figures = self.train(examples, work, self.training)
        shutil.rmtree(folder / "model", ignore_errors=True)
        os.replace(work, folder / "model")
        write_whole(folder, "figures.json", json.dumps(dict(figures)))
        return figures

    def _command(self, command: str, chosen: np.ndarray, work: Path) -> Mapping[str, float]:
        """The user's trainer on a file of the rows, verbatim."""
        data = work.parent / "data"
        self._write(data, self._verdicts(chosen))
        kept = next(p for p in sorted(data.iterdir()) if p.name.startswith("kept"))
        fields = {"data": kept, "out": work, "model": self.settings.model, "seed": self.training.seed}
        return run_trainer(command, self.tuning.trainer_config, fields, work)

    def _evaluate(self, model: Model, folder: Path, *, utility: bool, safety: bool = True) -> tuple[float, float]:
        """(ASR, utility), NaN for what is not asked for; the answers behind them go to the folder."""
        asr = value = float("nan")
        if safety:
            try:
                report = evaluate_safety(model, self.measuring)
            except JudgeFailed as failed:
                write_safety(failed.report, folder)
                raise
            write_safety(report, folder)
            asr = report.asr
        if utility:
            rows = [self.encoded.examples[n] for n in self.held_out]
            found = evaluate_utility(model, rows if self.tuning.task == HELD_OUT else self.tuning.task, self.measuring)
            write_utility(found, folder)
            value = found.value
        return asr, value

    def _verdicts(self, kept: np.ndarray) -> list[str]:
        verdicts = ["quarantined"] * self.encoded.rows
        for n in kept.tolist():
            verdicts[self.encoded.examples[n].row] = "kept"
        for row in self.encoded.reasons:
            verdicts[row] = "set aside"
        return verdicts

    def _write(self, folder: Path, verdicts: list[str]) -> dict[str, int]:
        return write_outputs(self.source, verdicts, self.encoded.reasons, folder)

    def finish(self, outcome: Outcome, goal: Goal, seconds: float) -> dict[str, Any]:
        """Hands out the accepted trial's model and rows, or keeps the safest model of a rejected search."""
        chosen = outcome.accepted or outcome.best
        counts: dict[str, int] = {}
        if outcome.accepted:
            trained, limit = self.chosen[outcome.accepted.number], outcome.accepted.threshold
            held = self.held_out if limit is None else self.held_out[self.screen[0][self.held_out] < limit]
            counts = self._write(self.out, self._verdicts(np.concatenate([trained, held])))
        folder = None
        if chosen:
            folder = self.out / ("model" if outcome.accepted else "rejected-model")
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(self.out / "trials" / f"{chosen.number:02d}" / "model", folder)
            (folder / "README.md").write_text(card(self, outcome, chosen, goal), encoding="utf-8")
        trials = self.trials
        scored = "screen" in self.__dict__
        return {
            "file": self.path,
            "accepted": outcome.accepted.number if outcome.accepted else None,
            "reason": outcome.reason,
            "rows": self.encoded.rows,
            **{name.replace(" ", "_"): count for name, count in counts.items()},
            "held_out": len(self.held_out),
            "base": {"asr": goal.base_asr, "utility": goal.base_utility},
            "goal": {"max_asr": goal.max_asr, "min_utility": goal.min_utility},
            "asr": chosen.asr if chosen else None,
            "utility": chosen.utility if chosen else None,
            "task": self.tuning.task,
            "model": str(folder) if folder else None,
            "cost": {
                "trials": len(trials),
                "steps": sum(t["steps"] for t in trials),
                "scored_tokens": sum(len(e.ids) for e in self.encoded.examples) if scored else 0,
                "safety_evaluations": 1 + sum(t["asr"] is not None for t in trials),
                "seconds": round(seconds, 1),
            },
            "trials": trials,
            "version": version("gradshield"),
        }


def load_trained(settings: FilterSettings, folder: Path) -> Model:
    """What a trial left: its adapter laid over the settings' model (and adapter), or a whole model."""
    if not (folder / "adapter_config.json").exists():
        return load_model(str(folder), device=settings.device, dtype=settings.dtype)
    return load(settings, over=str(folder))
