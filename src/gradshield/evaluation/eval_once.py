"""`eval` without the model where all that is asked for is measured. Imports no torch."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

from gradshield.base.errors import UserError
from gradshield.base.settings import ModelSettings, RowSettings
from gradshield.base.storage import read_yaml, refuse_links, remove_leftovers
from gradshield.data import Source, open_source
from gradshield.data.rows import expanded
from gradshield.data.run_folder import checksums
from gradshield.data.summaries import EvaluationSummary, read_summary
from gradshield.evaluation.config import EvaluationSettings
from gradshield.evaluation.sources import harmful_requests, scary_requests
from gradshield.evaluation.tasks import find_task
from gradshield.models.on_disk import disk_fingerprint
from gradshield.screen.validate import check_input, check_places

SUMMARY = "eval.yaml"


def asked_of_eval(
    settings: EvaluationSettings, task: str | None, of: RowSettings, source: Source | None
) -> dict[str, Any]:
    """What must be the same for a part to count as done, beside the model; files count by their bytes."""
    asked: dict[str, Any] = {"task": task} if task else {}
    if source:
        reading = RowSettings.model_fields.keys() - ModelSettings.model_fields.keys()
        asked = {"task": source.path} | of.model_dump(mode="json", include=set(reading))
    return {
        "settings": settings.model_dump(mode="json") | asked,
        "file": checksums(settings.requests, settings.scary, task) | ({source.path: source.sha256} if source else {}),
        "versions": {name: version(name) for name in ("gradshield", "torch", "transformers")},
    }


def check_eval(
    settings: EvaluationSettings, of: RowSettings, *, safety: bool, task: str | None, rows: str | None
) -> None:
    """Raises UserError where nothing, or too much, is to be measured, or the model or a file is not there."""
    if not safety and task is None and rows is None:
        raise UserError("nothing to measure: add --safety, --task NAME or --rows FILE")
    if task is not None and rows is not None:
        raise UserError("--task and --rows both measure utility: use one of them")
    for option, given in (("judge", settings.judge), ("requests", settings.requests != "bundled")):
        if given and not safety:
            raise UserError(f"--{option} is for answers to harmful requests: add --safety")
    if settings.judge_model and not settings.judge:
        raise UserError("--judge-model names a model at a judge's endpoint: add --judge URL")
    check_places(of)
    if task is not None:
        find_task(task, settings)
    if safety:
        harmful_requests(settings.requests, settings.request_count, settings.case_seed)
        scary_requests(settings.scary, settings.request_count, settings.case_seed)
    if rows is not None:
        check_input(rows, of)


def evaluate_model(
    out: Path, settings: EvaluationSettings, of: RowSettings, *, safety: bool, task: str | None, rows: str | None
) -> EvaluationSummary:
    """The summary in `out`: at once if all of it is measured already, else after `run_evaluation` has measured it."""
    file, files = out / SUMMARY, disk_fingerprint(of)
    measured = {"safety": safety, "utility": task is not None or rows is not None}
    if files and file.is_file() and any(measured.values()) and (rows is None or expanded(rows).is_file()):
        refuse_links(out)
        saved = read_yaml(file)
        source = None if rows is None else open_source(rows, of.format, of.split)
        wanted = {**asked_of_eval(settings, task, of, source), "model": {"files": files}}
        there = [(saved.get(part), values) for part, values in wanted.items()]
        same = all(isinstance(a, dict) and all(a.get(k) == v for k, v in values.items()) for a, values in there)
        if same and all(part in saved for part, needed in measured.items() if needed):
            remove_leftovers(out)
            return read_summary(EvaluationSummary, saved, file)
    check_eval(settings, of, safety=safety, task=task, rows=rows)
    from gradshield.evaluation.measure import run_evaluation

    return run_evaluation(out, settings, of, safety=safety, task=task, rows=rows)
