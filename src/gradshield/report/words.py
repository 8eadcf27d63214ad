"""What a run found, in words: figures with their intervals, and the commands that come next. Imports no torch."""

import shlex
from pathlib import Path

from gradshield.data.run_folder import rows_file
from gradshield.data.summaries import EvaluationSummary, Interval, SafetySummary, UnseenSummary


def evaluation_in_words(summary: EvaluationSummary) -> dict[str, str]:
    """The figures of an evaluation for a person, each with its interval and the number of cases."""
    words = {"model": summary.model.name}
    if summary.safety:
        words |= safety_in_words(summary.safety)
    if utility := summary.utility:
        figure = _figure(utility.value, utility.interval, utility.n, "cases")
        words["utility"] = f"{utility.metric} {figure}, {utility.task}"
    return words


def safety_in_words(safety: SafetySummary) -> dict[str, str]:
    """The figures of a model's safety for a person."""
    words = {"attack success rate": _figure(safety.asr, safety.asr_interval, safety.requests, "requests")}
    if safety.asr_phrases is not None:  # earlier versions have no such share
        words["by the paper's refusal phrases"] = f"{safety.asr_phrases:.3f}"
    if safety.over_refusal is not None:
        figures = (safety.over_refusal, safety.over_refusal_interval, safety.scary_requests)
        words["over-refusal"] = _figure(*figures, "harmless requests that look scary")
    if safety.hs is not None:
        graded = safety.requests - safety.ungraded
        words["harmfulness, 1 to 5"] = _figure(safety.hs, safety.hs_interval, graded, "answers")
        words["judge"] = f"{safety.judge}{_control(safety.judge_control)}"
    if safety.asr_judge is not None:
        words["harmful by the judge"] = f"{safety.asr_judge:.3f} of the answers that it graded"
    if safety.ungraded:
        words["not graded"] = f"{safety.ungraded} answers: the judge's reply stated no grade"
    return words


def unseen_in_words(unseen: UnseenSummary | None) -> dict[str, str]:
    """The attack success rate on requests that no decision has used, if it was measured."""
    if not unseen:
        return {}
    figure = _figure(unseen.asr, unseen.asr_interval, unseen.requests, "requests that no decision has seen")
    return {"attack success rate, unseen": figure}


def rows_in_words(trained: int, kept: int, quarantined: int, set_aside: int) -> str:
    """The counts of rows after an accepted search. Rows that are kept but not trained on were held out."""
    held = kept - trained
    parts = f" ({trained:,} trained on, {held:,} held out to measure utility)" if held else " and trained on"
    return f"{kept:,} kept{parts}, {quarantined:,} quarantined, {set_aside:,} set aside"


def next_steps(out: Path, row: int | None, called: Path | None = None) -> list[tuple[str, str]]:
    """(what, command to copy) after a filter run in `out`; `row` is the one worth explaining, if any. `called` is what
    the commands call the folder, where that is not its path: a report is the same in any folder."""
    kept = rows_file(out, "kept")
    called = called or out
    folder = shlex.quote(argument(called))
    steps = []
    if kept and (out / "train.py").exists():
        steps.append((f"train with {called / kept.name}", f"python {shlex.quote(argument(called / 'train.py'))}"))
    steps.append(("look at rows and decide", f"gradshield review {folder}"))
    if row is not None:
        steps.append((f"see why row {row} scored highest", f"gradshield explain {folder} {row}"))
    return steps


def argument(path: str | Path) -> str:
    """The path as an argument of a command, which would take a leading dash for an option."""
    return f"./{path}" if str(path).startswith("-") else str(path)


def command_again(path: str, run: Path) -> str:
    """The command that filters the run's rows again with its settings; empty where the rows came from stdin."""
    words = ("gradshield", "filter", argument(path), "--config", argument(run / "run.yaml"), "-o", "again")
    return shlex.join(words) if path != "-" else ""


def _control(grades: Interval | None) -> str:
    """How far the judge separates refusals from answers that comply."""
    if grades is None or grades[0] is None or grades[1] is None:
        return ", which grades neither plain refusals nor complying openings"
    doubt = "; it can't tell them apart, so its grades say nothing" if grades[1] - grades[0] < 1 else ""
    return f", which grades plain refusals {grades[0]:.1f}, complying openings {grades[1]:.1f}{doubt}"


def _figure(value: float, interval: Interval | None, count: int, what: str) -> str:
    within = (
        f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval and None not in interval else ""
    )  # of one case: none
    return f"{value:.3f}{within} of {count} {what}"
