"""From a dataset to a fine-tuned model that is measured as safe and useful, or to a rejection (alg. 1).

Everything is in the run folder: `screen/` is the filter's own run, `trials/` has one folder per training,
`trials.jsonl` one line per trial, and `model/` is the accepted model. Safe to interrupt: calling it again resumes the
current trial.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from math import inf, isfinite
from pathlib import Path

import numpy as np

from gradshield.base.errors import UserError
from gradshield.base.processes import lead_processes, processes
from gradshield.base.settings import FilterSettings, FinetuneSettings, TuneSettings
from gradshield.data import open_source
from gradshield.data.encode import Example
from gradshield.data.run_folder import TRIALS, catch_write_errors, find_run, open_run, plan_of, write_run
from gradshield.data.summaries import TrialSummary, TuneSummary
from gradshield.defenses.aligned import aligned_settings, check_aligned
from gradshield.defenses.base import DefenseContext, check_defense, no_hooks, no_prompt
from gradshield.defenses.registry import find_defense
from gradshield.defenses.train import train_defended
from gradshield.evaluation.config import EvaluationSettings
from gradshield.evaluation.sources import harmful_requests, scary_requests
from gradshield.evaluation.tasks import find_task
from gradshield.models.load import load_settings_model
from gradshield.models.on_disk import EMBEDDED, EMBEDDED_BASE, disk_fingerprint
from gradshield.report.tune_page import report_trials
from gradshield.screen.encoding import find_layout
from gradshield.screen.validate import find_checked
from gradshield.training.external import FIELDS, fill_fields
from gradshield.training.finetune import check_device, check_method, check_training
from gradshield.tune.measuring import Measuring
from gradshield.tune.pool import HELD_OUT, Pool
from gradshield.tune.search import Outcome, Trial, search
from gradshield.tune.trainer import Finetune, Trainer
from gradshield.tune.trials import Trials
from gradshield.tune.tune_once import asked_of_tune


def run_tune(
    path: str,
    out: Path,
    settings: FilterSettings,
    training: FinetuneSettings,
    tuning: TuneSettings,
    measuring: EvaluationSettings,
    *,
    trainer: Finetune | None = None,
    on_trial: Callable[[TrialSummary], None] = lambda trial: None,
) -> TuneSummary | None:
    """Searches for rows of `path` that a safe and useful model can be trained on, and trains it, in the folder `out`.

    `trainer` replaces the fine-tuning; `on_trial` gets every trial as it ends. Returns the summary, which run.yaml
    ends with. Its `accepted` is the number of the trial whose model is in `out/model`, or None: rejected, with the
    safest model in `out/rejected-model`. Raises UserError for what the user can fix, also when the base model itself
    misses the goal, before anything is trained. Where a launcher started several processes, all of them call this and
    all train. The first one does the rest; the others return None if it raised an error.
    """
    aligned = cache(partial(aligned_settings, settings, tuning.defense))
    loaded = cache(lambda: load_settings_model(aligned()))

    def lead(train: Callable[..., Mapping[str, float]]) -> TuneSummary:
        _check(settings, training, tuning, measuring, trainer)
        source = open_source(path, settings.format, settings.split)
        layout = find_layout(source, settings)
        model = loaded()
        check_method(model, training)
        defense, options = find_defense(tuning.defense)
        check_defense(defense, DefenseContext(model, aligned(), training), options)
        if not (trainer or tuning.trainer_command):
            check_device(model)
        asked = asked_of_tune(settings, training, tuning, measuring)
        plan = plan_of(source, model, layout, files=disk_fingerprint(settings), **asked)
        if finished := find_run(out, plan, TuneSummary, _may_change(out, tuning, measuring)):
            return finished
        with open_run(out, plan, _may_change(out, tuning, measuring)):
            pool = Pool(out, source, layout, model, aligned(), training, tuning)
            measure = Measuring(measuring, tuning, lambda: pool.held_out_examples)
            trials = Trials(pool, Trainer(pool, trainer, train), measure, measure.goal(model, out))
            run = _search if "search" in pool.defense.needs else _train_once
            summary = trials.finish(run(trials, on_trial))
            with catch_write_errors(out):
                report_trials(out, plan, summary)
                write_run(out, {**plan.as_dict(), "summary": summary.as_dict()})
        return summary

    def train(examples: Sequence[Example], folder: Path) -> Mapping[str, float]:
        return train_defended(loaded(), examples, folder, training, aligned(), tuning.defense)

    return lead_processes(lead, train, cpu=settings.device == "cpu")


def _may_change(out: Path, tuning: TuneSettings, measuring: EvaluationSettings) -> set[str]:
    """Settings that may differ when the run is resumed, since nothing done so far depends on them. The judge may change
    from trial to trial, since each trial's line names its own."""
    free = {"judge", "judge_model"}
    if not (out / TRIALS).exists():
        free |= {"max_asr", "min_utility"}
    if not any((out / "trials").glob("*/figures.json")):  # nothing is trained
        free |= {"trainer_command", "trainer_config", str(tuning.trainer_config)}  # the last: its checksum
    if not (out / "base.json").exists():
        free |= {"task", tuning.task, "request_count", "requests", measuring.requests}
    return free


def _check(
    settings: FilterSettings,
    training: FinetuneSettings,
    tuning: TuneSettings,
    measuring: EvaluationSettings,
    trainer: Finetune | None,
) -> None:
    """Raises UserError for mistakes that would otherwise show only after long work."""
    find_checked(settings)
    check_training(training)
    defense, _ = find_defense(tuning.defense)
    check_aligned(defense, settings)
    if (trainer or tuning.trainer_command) and (defense.hooks is not no_hooks or defense.prompt is not no_prompt):
        raise UserError(
            f"--defense {defense.name} changes the training itself, so it can't be used with your own trainer"
        )
    if tuning.trainer_command and defense.needs & {"safe rows", "harmful rows"}:
        raise UserError(
            f"--defense {defense.name} adds rows to the file's, which can't be passed to a --trainer-command"
        )
    harmful_requests(measuring.requests, measuring.request_count, measuring.case_seed)
    scary_requests(measuring.scary, measuring.request_count, measuring.case_seed)
    if tuning.task != HELD_OUT:
        find_task(tuning.task, measuring)
    if tuning.trainer_command:
        fill_fields(tuning.trainer_command, tuning.trainer_config, dict.fromkeys(FIELDS, ""), Path())
    elif tuning.trainer_config:
        raise UserError(f"--trainer-config {tuning.trainer_config} does nothing without --trainer-command")
    if tuning.trainer_config and "{config}" not in str(tuning.trainer_command):
        raise UserError("--trainer-command: it has no {config} placeholder for --trainer-config; add it")
    if settings.quantize and training.method == "full":
        raise UserError("--method full can't train quantised weights: leave out --quantize")
    own = trainer or tuning.trainer_command
    if own and (settings.adapter or settings.model in (EMBEDDED, EMBEDDED_BASE)):
        raise UserError(
            "your own trainer starts from --model alone, which must be a model that it can load: "
            "merge an --adapter into it, and name a folder or a Hub id"
        )
    if processes() > 1 and own:
        raise UserError("your own trainer starts its own processes: start tune without a launcher")
    if processes() > 1 and settings.device not in (None, "cpu", "cuda"):
        raise UserError(f"--device {settings.device}: each process uses its own device; leave out --device")
    number = (settings.device or "").removeprefix("cuda:")
    if number.isdigit() and int(number) and not own:
        raise UserError(
            f"--device {settings.device}: the Trainer uses the first GPU: set CUDA_VISIBLE_DEVICES={number}"
        )


def _train_once(trials: Trials, on_trial: Callable[[TrialSummary], None]) -> Outcome:
    """One training under a defense that does not search."""
    pool = trials.pool
    given, count = pool.defended(), len(pool.rows)
    at = {pool.encoded.examples[n].row: place for place, n in enumerate(pool.rows)}
    chosen = np.array([at[e.row] for e in given if e.row in at], dtype=int)
    if not given:
        return Outcome(None, None, (), "the defense leaves no row to train on")
    limit = pool.screen[1].value if "screening" in pool.defense.needs else inf
    threshold = limit if isfinite(limit) else None  # infinite: nothing is removed
    trial = trials.measure(Trial(1, threshold, 0, count, len(chosen), None, None, False, False), chosen, given)
    on_trial(trials.finished[0])
    accepted = trial if trial.safe and trial.useful else None
    reason = "safe and useful" if accepted else trial.note or "not safe"
    return Outcome(accepted, trial if trial.asr is not None else None, (trial,), reason)


def _search(trials: Trials, on_trial: Callable[[TrialSummary], None]) -> Outcome:
    """The search (alg. 1)."""
    pool = trials.pool

    def measure(trial: Trial, chosen: np.ndarray) -> Trial:
        measured = trials.measure(trial, chosen)
        on_trial(trials.finished[trial.number - 1])
        return measured

    return search(
        lambda: pool.scores,
        pool.guess,
        measure,
        len(pool.rows),
        screen_first=pool.screens_first,
        max_searches=pool.tuning.searches,
        step=pool.tuning.step,
        literal=pool.tuning.literal,
    )
