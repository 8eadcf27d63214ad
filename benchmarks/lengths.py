"""Every method at its own best batch size, over rows of one length at a time.

First every batch size is timed once. Then the method and a forward pass, each with the batch size that was fastest for
it, take turns. The floor of any score that needs gradients at every token, a forward pass and the backward pass of the
activations alone, is measured in the same run.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.measure import ALL, installed, loaded, machine, run_once
from benchmarks.methods import Task, make_task
from benchmarks.models import open_model
from benchmarks.plan import measured, read_cells
from benchmarks.rows import chats, pieces, tokens_of
from gradshield.data.encode import Example

LENGTHS = (32, 128, 512, 1024)
TOKENS = 2048  # of all rows of one length
SIZES = (512, 1024, 2048)  # tokens of a batch
REPEATS = 3
COMPARED = ("activations", "paper", "module", "intent", "autograd", "dense", "bergson", "kronfluence")


def run(spec: str, file: Path, only: Sequence[str], lengths: Sequence[int] = LENGTHS, tokens: int = TOKENS) -> None:
    """Makes every measurement that `file` does not hold yet, then the table next to it."""
    measured(file, {"kind": "machine"}, machine)
    task = make_task(open_model(spec))
    source = chats(task.model, 2 * tokens)
    names = [name for name in COMPARED if installed(name) and (not only or name in only)]
    for length in lengths:
        rows = pieces(source, length, tokens // length)
        unit = _best(file, task, "forward", rows, length)
        for name in names:
            fastest = _best(file, task, name, rows, length)
            for repeat in range(REPEATS):
                key = {"kind": "best", "method": name, "length": length, "repeat": repeat}
                measured(file, key, partial(_turns, unit, fastest, name, rows, repeat))
    file.with_suffix(".md").write_text(table(file), encoding="utf-8")


def table(file: Path) -> str:
    """Medians (and ranges) of the ratios to a forward pass, and the batch size of each, by length."""
    cells = [cell for cell in read_cells(file) if cell["kind"] == "best"]
    lengths = sorted({cell["length"] for cell in cells})
    lines = [
        "Times are multiples of a forward pass over the same rows, each at its best batch size (tokens, in brackets).",
        "",
        "| method | " + " | ".join(f"{length} tokens" for length in lengths) + " |",
        "|---" * (len(lengths) + 1) + "|",
    ]
    for name in dict.fromkeys(cell["method"] for cell in cells):
        shown = []
        for length in lengths:
            own = [cell for cell in cells if (cell["method"], cell["length"]) == (name, length)]
            ratios = sorted(cell["seconds"] / cell["forward"] for cell in own)
            shown.append(
                f"{median(ratios):.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f}) [{own[0]['batch_tokens']}]" if own else ""
            )
        lines.append(f"| {ALL[name].label} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def _best(file: Path, task: Task, name: str, rows: Sequence[Example], length: int) -> Task:
    """The task with the batch size at which the method is fastest. Per-example autograd has no batches."""
    times = {}
    for size in SIZES if name != "autograd" else SIZES[:1]:
        key = {"kind": "size", "method": name, "length": length, "batch_tokens": size}
        sized = replace(task, batch_tokens=size)
        times[size] = measured(file, key, partial(_timed, sized, name, rows))["seconds"]
    return replace(task, batch_tokens=min(times, key=times.__getitem__))


def _timed(task: Task, name: str, rows: Sequence[Example]) -> dict[str, Any]:
    return {"seconds": run_once(task, name, rows).seconds, "tokens": tokens_of(rows), "load": loaded()}


def _turns(unit: Task, task: Task, name: str, rows: Sequence[Example], repeat: int) -> dict[str, Any]:
    """Seconds of the method and of a forward pass, one right after the other, in alternating order."""
    turns = [("forward", unit), (name, task)]
    seconds = {each: run_once(own, each, rows).seconds for each, own in (turns if repeat % 2 == 0 else turns[::-1])}
    return {
        "seconds": seconds[name],
        "forward": seconds["forward"],
        "batch_tokens": task.batch_tokens,
        "forward_batch_tokens": unit.batch_tokens,
        "load": loaded(),
    }
