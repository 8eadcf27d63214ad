"""An evaluation's run folder: eval.yaml with the figures, and every answer behind them in two jsonl files."""

import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from gradshield.base.errors import UserError
from gradshield.base.settings import RowSettings
from gradshield.base.storage import read_yaml, refuse_links, write_yaml
from gradshield.data import Source, open_source
from gradshield.data.encode import Example
from gradshield.data.run_folder import ROWS, catch_write_errors, run_lock
from gradshield.data.summaries import EvaluationSummary, SafetySummary, UtilitySummary, read_summary
from gradshield.evaluation.config import EvaluationSettings
from gradshield.evaluation.eval_once import SUMMARY, asked_of_eval, check_eval
from gradshield.evaluation.evaluate import JudgeFailed, evaluate_safety, write_safety, write_utility
from gradshield.evaluation.safety import SafetyReport
from gradshield.evaluation.utility import UtilityReport, evaluate_utility
from gradshield.models.load import Model, load_settings_model
from gradshield.models.on_disk import disk_fingerprint
from gradshield.screen.encoding import encode_source, find_layout


def run_evaluation(
    out: Path,
    settings: EvaluationSettings,
    of: RowSettings,
    *,
    safety: bool = False,
    task: str | None = None,
    rows: str | None = None,
) -> EvaluationSummary:
    """Measures the model that `of` names into the folder `out`, and returns the summary that is saved in eval.yaml.

    It measures safety, utility at `task`, or the loss on the held-out `rows` of a file in any layout. A part that is
    already measured for the same model and settings is not measured again. Raises UserError for
    anything the user can fix, as far as possible before the model is loaded.
    """
    check_eval(settings, of, safety=safety, task=task, rows=rows)
    source = None if rows is None else open_source(rows, of.format, of.split)
    model = load_settings_model(of)
    identity = {"name": model.name, "fingerprint": model.fingerprint, "files": disk_fingerprint(of)}
    plan = {"model": identity, **asked_of_eval(settings, task, of, source)}
    _saved_or_new(out, plan)  # raises before a folder is made
    with catch_write_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    try:
        with run_lock(out):
            found = _measure(out, _saved_or_new(out, plan), model, settings, of, safety, task, source)
            return read_summary(EvaluationSummary, found, out / SUMMARY)
    except KeyboardInterrupt as stop:
        if (out / SUMMARY).exists():
            stop.add_note(f"{out} keeps what is measured")
        raise
    finally:
        with suppress(OSError):
            out.rmdir()  # where nothing came of it


def _measure(
    out: Path,
    summary: dict[str, Any],
    model: Model,
    settings: EvaluationSettings,
    of: RowSettings,
    safety: bool,
    task: str | None,
    source: Source | None,
) -> dict[str, Any]:
    """Measures the parts that are asked for and missing from the summary, and returns it with them."""
    if safety and "safety" not in summary:
        start = time.monotonic()
        try:
            report = evaluate_safety(model, settings)
        except JudgeFailed as failed:
            _write_yaml(out, summary)
            write_safety(failed.report, out)
            raise
        _write_yaml(out, summary)  # first, as the mark of an evaluation's folder
        write_safety(report, out)
        summary["safety"] = safety_summary(report).as_dict() | {"seconds": round(time.monotonic() - start, 1)}
        _write_yaml(out, summary)
    if (task or source) and "utility" not in summary:
        start = time.monotonic()
        measured = held_out_rows(source, model, of) if source else str(task)
        useful = evaluate_utility(model, measured, settings)
        _write_yaml(out, summary)
        write_utility(useful, out)
        summary["utility"] = utility_summary(useful).as_dict() | {"seconds": round(time.monotonic() - start, 1)}
        _write_yaml(out, summary)
    return summary


def held_out_rows(source: Source, model: Model, of: RowSettings) -> list[Example]:
    """The rows of a file in any layout that `filter` reads, as examples. Raises UserError as `filter` does."""
    return list(encode_source(source, find_layout(source, of), model, of).examples)


def safety_summary(report: SafetyReport) -> SafetySummary:
    """The report's figures, without requests and answers."""
    over_refusal = {
        "over_refusal": report.over_refusal,
        "over_refusal_interval": report.over_refusal_interval,
        "scary_requests": len(report.scary_requests),
    }
    judged = {
        "judge": report.judge,
        "hs": report.hs,
        "hs_interval": report.hs_interval,
        "asr_judge": report.asr_judge,
        "ungraded": report.ungraded,
        "judge_control": report.control,
    }
    return SafetySummary(
        asr=report.asr,
        asr_interval=report.interval,
        asr_phrases=report.asr_phrases,
        requests=len(report.requests),
        **(over_refusal if report.over_refusal is not None else {}),
        **(judged if report.judge is not None else {}),
    )


def utility_summary(report: UtilityReport) -> UtilitySummary:
    """The report's figures, without cases and answers."""
    names = ("task", "metric", "value", "error", "interval", "n")
    return UtilitySummary(**{name: getattr(report, name) for name in names})


def _saved_or_new(out: Path, plan: Mapping[str, Any]) -> dict[str, Any]:
    """The evaluation that the folder holds already, else the plan alone. Raises UserError where it is another's."""
    file = out / SUMMARY
    refuse_links(out)
    if not file.is_file():
        if out.is_file() or (out.is_dir() and any(p.name[0] != "." and p.name != ROWS for p in out.iterdir())):
            raise UserError(f"{out}: not empty and not an evaluation; choose another folder with -o")
        return dict(plan)
    found = read_yaml(file)
    same: dict[str, Any] = {part: found.get(part) for part in plan}
    if not all(isinstance(part, dict) for part in same.values()):
        raise UserError(f"{file}: can't be read as an evaluation; choose another folder with -o")
    for part, wanted in plan.items():
        for key, value in wanted.items():
            if key in ("judge", "judge_model") and "safety" not in found:  # no one has graded anything
                same[part][key] = value
            there = same[part].setdefault(key, value)  # what an earlier call did not ask for
            if key == "files":  # another file beside the model's own
                same[part][key] = there = value
            if there != value:
                raise UserError(
                    f"{out}: created with different {part} ({key}: {there}, now {value}); choose another -o"
                )
    return found


def _write_yaml(out: Path, summary: Mapping[str, Any]) -> None:
    with catch_write_errors(out):
        write_yaml(out / SUMMARY, summary)
