"""An evaluation's run folder: eval.yaml with the figures, and every answer behind them in two jsonl files."""

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from gradshield.base.errors import UserError
from gradshield.base.settings import RowSettings
from gradshield.base.storage import read_yaml, refuse_links, write_yaml
from gradshield.data import Source, open_source
from gradshield.data.encode import Example
from gradshield.data.run_folder import catch_write_errors, run_lock
from gradshield.evaluation.config import EvaluationSettings
from gradshield.evaluation.eval_once import SUMMARY, asked_of_eval, check_eval
from gradshield.evaluation.evaluate import JudgeFailed, evaluate_safety, write_safety, write_utility
from gradshield.evaluation.safety import SafetyReport
from gradshield.evaluation.utility import UtilityReport, evaluate_utility, find_task
from gradshield.models.load import Model
from gradshield.models.on_disk import disk_fingerprint
from gradshield.screen.encoding import encode_source, find_layout
from gradshield.screen.filter import load


def run_evaluation(
    out: Path,
    settings: EvaluationSettings,
    of: RowSettings,
    *,
    safety: bool = False,
    task: str | None = None,
    rows: str | None = None,
) -> dict[str, Any]:
    """Measures the model that `of` names into the folder `out` and returns the summary that eval.yaml holds: its
    safety, its utility at `task`, or its loss on the held-out `rows` of a file in any layout.

    A part that is done there already, for the same model and settings, is not measured again. Raises UserError for
    anything the user can mend, as far as can be before the model is loaded.
    """
    check_eval(settings, of, safety=safety, task=task, rows=rows)
    if task is not None:
        find_task(task, settings)
    source = None if rows is None else open_source(rows, of.format, of.split)
    model = load(of)
    identity = {"name": model.name, "fingerprint": model.fingerprint, "files": disk_fingerprint(of)}
    plan = {"model": identity, **asked_of_eval(settings, task, of, source)}
    _taken_up(out, plan)  # before a folder is made
    with catch_write_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    try:
        with run_lock(out):
            return _measured(out, _taken_up(out, plan), model, settings, of, safety, task, source)
    except KeyboardInterrupt as stop:
        if (out / SUMMARY).exists():
            stop.add_note(f"{out} keeps what is measured")
        raise
    finally:
        with suppress(OSError):
            out.rmdir()  # where nothing came of it


def _measured(
    out: Path,
    summary: dict[str, Any],
    model: Model,
    settings: EvaluationSettings,
    of: RowSettings,
    safety: bool,
    task: str | None,
    source: Source | None,
) -> dict[str, Any]:
    """The summary with what it lacked of the parts that are asked for."""
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
        summary["safety"] = plain({**safety_summary(report), "seconds": round(time.monotonic() - start, 1)})
        _write_yaml(out, summary)
    if (task or source) and "utility" not in summary:
        start = time.monotonic()
        measured = held_out_rows(source, model, of) if source else str(task)
        useful = evaluate_utility(model, measured, settings)
        _write_yaml(out, summary)
        write_utility(useful, out)
        summary["utility"] = plain({**utility_summary(useful), "seconds": round(time.monotonic() - start, 1)})
        _write_yaml(out, summary)
    return summary


def held_out_rows(source: Source, model: Model, of: RowSettings) -> list[Example]:
    """The rows of a file in any layout that `filter` reads, as examples. Raises UserError as `filter` does."""
    return list(encode_source(source, find_layout(source, of), model, of).examples)


def safety_summary(report: SafetyReport) -> dict[str, Any]:
    """The report's figures, without requests and answers."""
    figures: dict[str, Any] = {"asr": report.asr, "asr_interval": report.interval, "asr_phrases": report.asr_phrases}
    figures |= {"requests": len(report.requests)}
    if report.over_refusal is not None:
        figures |= {
            "over_refusal": report.over_refusal,
            "over_refusal_interval": report.over_refusal_interval,
            "scary_requests": len(report.scary_requests),
        }
    if report.judge is not None:
        figures |= {"judge": report.judge, "hs": report.hs, "hs_interval": report.hs_interval}
        figures |= {"asr_judge": report.asr_judge}
        figures |= {"ungraded": report.ungraded, "judge_control": report.control}
    return figures


def utility_summary(report: UtilityReport) -> dict[str, Any]:
    """The report's figures, without cases and answers."""
    texts = ("scores", "prompts", "references", "answers")
    return {f.name: getattr(report, f.name) for f in fields(report) if f.name not in texts}


def _taken_up(out: Path, plan: Mapping[str, Any]) -> dict[str, Any]:
    """What the folder holds already, or the plan alone."""
    file = out / SUMMARY
    refuse_links(out)
    if not file.is_file():
        if out.is_file() or (out.is_dir() and any(not p.name.startswith(".") for p in out.iterdir())):
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
                    f"{out}: an evaluation with another {part} ({key}: {there}, not {value}); choose another -o"
                )
    return found


def _write_yaml(out: Path, summary: Mapping[str, Any]) -> None:
    with catch_write_errors(out):
        write_yaml(out / SUMMARY, summary)


def plain(figures: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON and YAML have it: lists for tuples, None for what is not a number (an error over one case)."""
    return json.loads(json.dumps(figures), parse_constant=lambda _: None)
