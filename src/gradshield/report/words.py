"""What a run found, in words: figures with their intervals, and the commands that come next. Imports no torch."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def in_words(summary: Mapping[str, Any]) -> dict[str, str]:
    """The figures of an evaluation for a person: each with its interval and what it is of."""
    words = {"model": str(summary["model"]["name"])}
    if safety := summary.get("safety"):
        words |= safety_in_words(safety)
    if utility := summary.get("utility"):
        figures = (utility["value"], utility["interval"], utility["n"])
        words["utility"] = f"{utility['metric']} {_figure(*figures, 'cases')}, {utility['task']}"
    return words


def safety_in_words(safety: Mapping[str, Any]) -> dict[str, str]:
    """The figures of `safety_summary` for a person."""
    figures = (safety["asr"], safety["asr_interval"], safety["requests"])
    words = {"attack success rate": _figure(*figures, "requests")}
    if safety.get("asr_phrases") is not None:  # earlier versions and requests of none have no such share
        words["by the paper's refusal phrases"] = f"{safety['asr_phrases']:.3f}"
    if "over_refusal" in safety:
        figures = (safety["over_refusal"], safety["over_refusal_interval"], safety["scary_requests"])
        words["over-refusal"] = _figure(*figures, "harmless requests that look scary")
    if safety.get("hs") is not None:
        graded = safety["requests"] - safety["ungraded"]
        words["harmfulness, 1 to 5"] = _figure(safety["hs"], safety["hs_interval"], graded, "answers")
        words["judge"] = f"{safety['judge']}{_control(safety['judge_control'])}"
    if safety.get("asr_judge") is not None:
        words["harmful by the judge"] = f"{safety['asr_judge']:.3f} of the answers that it graded"
    if safety.get("ungraded"):
        words["not graded"] = f"{safety['ungraded']} answers: the judge's reply stated no grade"
    return words


def unseen_in_words(unseen: Mapping[str, Any] | None) -> dict[str, str]:
    """The attack success rate that no decision rests on, where there is one."""
    if not unseen:
        return {}
    figure = _figure(unseen["asr"], unseen["asr_interval"], unseen["requests"], "requests that no decision has seen")
    return {"attack success rate, unseen": figure}


def rows_in_words(trained: int, counts: Mapping[str, Any]) -> str:
    """Where the rows of an accepted search went: `counts` has "kept", "quarantined" and "set_aside"; what is kept and
    not trained on was held out."""
    kept, held = counts["kept"], counts["kept"] - trained
    parts = f" ({trained:,} trained on, {held:,} held out to measure utility)" if held else " and trained on"
    return f"{kept:,} kept{parts}, {counts['quarantined']:,} quarantined, {counts['set_aside']:,} set aside"


def next_steps(out: Path, row: int | None, called: Path | None = None) -> list[tuple[str, str]]:
    """(what, command to copy) after a filter run in `out`; `row` is the one worth explaining, if any. `called` is what
    the commands call the folder, where that is not its path: a report is the same wherever its folder stands."""
    kept = next((path for path in (out / "kept", *sorted(out.glob("kept.*"))) if path.exists()), None)
    called = called or out
    folder = shlex.quote(str(called))
    steps = []
    if kept and (out / "train.py").exists():
        steps.append((f"train with {called / kept.name}", f"python {shlex.quote(str(called / 'train.py'))}"))
    steps.append(("look at rows and decide", f"gradshield review {folder}"))
    if row is not None:
        steps.append((f"see why row {row} scored highest", f"gradshield explain {folder} {row}"))
    return steps


def _control(grades: Sequence[float] | None) -> str:
    if grades is None:
        return ", which grades neither plain refusals nor complying openings"
    doubt = "; it can't tell them apart, so its grades say nothing" if grades[1] - grades[0] < 1 else ""
    return f", which grades plain refusals {grades[0]:.1f}, complying openings {grades[1]:.1f}{doubt}"


def _figure(value: float, interval: Sequence[float | None], count: int, what: str) -> str:
    within = "" if None in interval else f" [{interval[0]:.3f}, {interval[1]:.3f}]"  # one case alone has none
    return f"{value:.3f}{within} of {count} {what}"
