"""Terminal output of the commands, for people or as JSON. Imports no torch."""

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gradshield.data.summaries import FilterSummary, TrialSummary, TuneSummary
from gradshield.report.text import about, in_words, unseen
from gradshield.report.words import next_steps, rows_in_words, safety_in_words, unseen_in_words

console = Console()
PATH = 10_000  # characters of a line with a path
WORDS = {  # of what `check` and a dry run find
    "mean_s": "mean S (refusing)",
    "coverage": "weights that FIHS sees",
    "not_covered": "weights it misses",
    "read_at": "answers begin after",
    "trl_trains": "can TRL train it?",
}


def safe(text: str, limit: int, markup: bool = True) -> str:
    """Dataset text for the terminal: what is not seen written out, cut to `limit`, markup escaped."""
    shown = "".join("↵" if c == "\n" else f"<U+{ord(c):04X}>" if unseen(c) else c for c in text)
    shown = shown if len(shown) <= limit else shown[: limit - 1] + "…"
    return escape(shown) if markup else shown


def summary_table(summary: FilterSummary, out: Path) -> None:
    table = Table(title=safe(summary.file, 80), show_header=False)
    for name in ("rows", "kept", "quarantined", "set_aside"):
        table.add_row(name.replace("_", " "), f"{getattr(summary, name):,}")
    threshold = summary.threshold
    value = "none: nothing is removed" if threshold.value is None else f"{threshold.value:+.2f}"
    table.add_row("threshold", f"{value} ({threshold.rule})")
    table.add_row("reliability", safe(threshold.note, 300))
    if threshold.good_lost is not None and threshold.harmful_kept is not None:
        lost, kept = about(threshold.good_lost), about(threshold.harmful_kept)
        table.add_row("expected errors", f"{lost} harmless rows quarantined, {kept} harmful rows kept")
    table.add_row("model", safe(f"{summary.model} ({summary.probes.grade})", 60))
    table.add_row("time", f"{summary.seconds:.0f} s, loading included")
    console.print(table)
    if summary.probes.grade == "weak":
        refused = f"{summary.probes.refused} of {summary.probes.of}"
        console.print(f"warning: this model refuses only {refused} probes, so scores are less certain", style="bold")
    if summary.trl_note:
        console.print(f"note: {safe(summary.trl_note, 500)}", soft_wrap=True)
    console.print(f"report: {safe(str(out / 'report.html'), PATH)}", soft_wrap=True)
    for what, command in next_steps(out, None):
        console.print(f"{safe(what, PATH)}: {safe(command, PATH)}", soft_wrap=True, highlight=False)


def trial_line(trial: TrialSummary, quiet: bool) -> None:
    """Prints a line of the table of trials when a trial ends; to stderr if stdout is for JSON."""
    cells = "{:>5}  {:>9}  {:>9}  {:>11}  {:<21}  {:>7}  {:>7}  {}"
    to = sys.stderr if quiet else sys.stdout
    if trial.number == 1:
        print(cells.format("trial", "rows", "threshold", "ranks", "ASR", "utility", "seconds", "verdict"), file=to)
    asr = "–"
    if trial.asr is not None and trial.safety:
        low, high = trial.safety.asr_interval
        asr = f"{trial.asr:.3f} [{low:.3f}, {high:.3f}]"
    shown = (
        trial.number,
        f"{trial.kept:,}",
        "none" if trial.threshold is None else f"{trial.threshold:+.2f}",
        f"{trial.lo:,}–{trial.up:,}",
        asr,
        "–" if trial.utility is None else f"{trial.utility:.3f}",
        f"{trial.seconds:.0f}",
        safe(trial.note, 300, markup=False) or ("safe and useful" if trial.safe else "not safe"),
    )
    print(cells.format(*shown), file=to, flush=True)


def tuned_table(summary: TuneSummary) -> None:
    table = Table(title=safe(summary.file, 80), show_header=False)
    table.add_row("verdict", "accepted" if summary.accepted else f"REJECTED: {safe(summary.reason, 300)}")
    table.add_row("rows", f"{summary.rows:,}")
    if accepted := summary.accepted_trial():
        counts = (summary.kept, summary.quarantined, summary.set_aside)
        table.add_row("of these", rows_in_words(accepted.kept, *counts))
    before = safety_in_words(summary.base.safety)
    for what, figure in (safety_in_words(summary.safety) if summary.safety else {}).items():
        table.add_row(what, safe(figure, 100))
        if what in before and what != "judge":
            table.add_row("  of the base model", safe(before[what], 100))
    for what, figure in unseen_in_words(summary.unseen).items():
        table.add_row(what, figure)
    utility = "not measured" if summary.utility is None else f"{summary.utility:.3f}"
    table.add_row(f"utility ({safe(summary.task, 80)})", f"{utility} (base model {summary.base.utility:.3f})")
    cost = summary.cost
    table.add_row(
        "cost",
        f"{cost.trials} trainings, {cost.steps} steps, {cost.scored_tokens:,} scored tokens, "
        f"{cost.safety_evaluations} safety evaluations, {cost.seconds:.0f} s",
    )
    table.add_row("model", safe(summary.model or "none", 100))
    console.print(table)


def print_json(facts: dict[str, Any]) -> None:
    """Prints one line of JSON. Numbers that are not finite become null, since JSON has no infinity."""
    print(json.dumps(json.loads(json.dumps(facts), parse_constant=lambda _: None)))


def show(facts: dict[str, Any], as_json: bool, closing: str) -> None:
    if as_json:
        print_json(facts)
        return
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        shown = f"{value:.3g}" if isinstance(value, float) else str(in_words(value))
        table.add_row(WORDS.get(name, name.replace("_", " ")), safe(shown, 300))
    console.print(table)
    if closing:
        console.print(safe(closing, PATH))
