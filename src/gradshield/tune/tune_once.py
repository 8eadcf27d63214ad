"""`tune` without loading the model if its run is finished. Imports no torch."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gradshield.base.processes import processes
from gradshield.base.registry import parse_spec
from gradshield.base.settings import FilterSettings, FinetuneSettings, TuneSettings
from gradshield.data.run_folder import checksums, finished_run
from gradshield.data.summaries import TrialSummary, TuneSummary
from gradshield.defenses.registry import DEFENSES
from gradshield.evaluation.config import EvaluationSettings
from gradshield.models.on_disk import disk_fingerprint
from gradshield.screen.validate import check_input, check_settings

Parts = tuple[FilterSettings, FinetuneSettings, TuneSettings, EvaluationSettings]


def asked_of_tune(
    settings: FilterSettings, training: FinetuneSettings, tuning: TuneSettings, measuring: EvaluationSettings
) -> dict[str, Any]:
    """The part of the run's plan that the flags say, and the files that they name."""
    parts = {"settings": settings, "finetune": training, "tune": tuning, "evaluation": measuring}
    named = (settings.probes, settings.reference, settings.chat_template, tuning.task, tuning.trainer_config)
    files = checksums(*named, measuring.requests, measuring.scary, parse_spec(tuning.defense)[1].get("safe"))
    return {**{name: part.model_dump(mode="json") for name, part in parts.items()}, "file": files}


def tune_file(path: str, out: Path, *parts: *Parts, on_trial: Callable[[TrialSummary], None]) -> TuneSummary | None:
    """The summary of the run in `out`: at once if it is finished, else after `run_tune`, which takes the same
    arguments, has finished it. None as `run_tune` returns it."""
    settings, _, tuning, _ = parts
    if processes() == 1 and os.path.isdir(out):
        summary = finished_run(out, path, asked_of_tune(*parts), disk_fingerprint(settings), TuneSummary)
        if summary is not None:
            return summary
    if processes() == 1:
        check_settings(settings)
        DEFENSES.check(tuning.defense)
        check_input(path, settings)
    from gradshield.tune.command import run_tune

    return run_tune(path, out, *parts, on_trial=on_trial)
