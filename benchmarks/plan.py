"""Which measurements make a benchmark, and the file that holds them: one line each, so that a run can be resumed."""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.measure import ALL, LORA_ROWS, installed, machine, pair, peak, peak_memory, run_once
from benchmarks.methods import Task, make_task
from benchmarks.models import open_model, weights
from benchmarks.rows import chats, mixed, pieces, tokens_of
from gradshield.base.errors import UserError
from gradshield.data.encode import Example
from gradshield.study.kinds import data_folder, load_public

OURS = ("paper", "module")
TIMED = "memory of timed batches"  # those that are timed; "memory" is at as many tokens as LoRA's step
SHORT_TIME = 20.0  # seconds; what takes less is measured three times
SHORT = 16  # tokens of a row where rows are counted


@dataclass(frozen=True)
class Plan:
    """Sizes of a benchmark; what they cost is about the same for every model, in units of a forward pass."""

    rows_main: tuple[int, int]  # rows of every kind, and chats; LoRA takes eight rows at once
    repeats: int
    rows_memory: tuple[int, int]  # the same for peak memory
    memory: tuple[str, ...]  # methods whose memory is measured; () for all
    grow: tuple[str, ...]  # methods whose growth is measured; () for all
    rows: tuple[int, ...]  # for forward and ours
    rows_others: tuple[int, ...]  # for the rest, which take longer
    lengths: tuple[int, ...]
    length_tokens: int  # tokens of all rows of one length
    probes: tuple[int, ...]
    sizes: tuple[str, ...]  # random weights, LAYERSxWIDTH
    longest: int = 1024  # tokens of a chat
    batch_tokens: int = 2048


FULL = Plan(
    rows_main=(2, 8),
    repeats=3,
    rows_memory=(1, 2),
    memory=(),
    grow=(),
    rows=(250, 1000, 4000),
    rows_others=(16, 32, 64),
    lengths=(32, 128, 512, 1024),
    length_tokens=1024,
    probes=(1, 4, 16, 64),
    sizes=("12x256", "16x384", "30x576"),
)
QUICK = Plan(
    rows_main=(1, 1),
    repeats=1,
    rows_memory=(1, 1),
    memory=("lora", "paper"),
    grow=("forward", "paper", "module"),
    rows=(16, 64),
    rows_others=(),
    lengths=(32, 128),
    length_tokens=128,
    probes=(1, 4),
    sizes=("2x128", "4x128"),
)
GPU = Plan(
    rows_main=(20, 16),
    repeats=3,
    rows_memory=(4, 16),
    memory=(),
    grow=("forward", "lora", "dense", *OURS, "intent", "bergson", "kronfluence"),
    rows=(250, 1000, 4000),
    rows_others=(64, 256),
    lengths=(32, 128, 512, 1024),
    length_tokens=16_384,
    probes=(1, 4, 16, 64),
    sizes=(),
    batch_tokens=8192,
)


def measured(file: Path, key: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The finished measurement with this key: the file's, or else made now and written there."""
    for cell in read_cells(file):
        if all(cell.get(name) == value for name, value in key.items()):
            return cell
    start = time.monotonic()
    cell = {**key, **measure()}
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.exists():
        os.truncate(file, file.read_bytes().rfind(b"\n") + 1)  # what a kill cut short
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(cell) + "\n")
    shown = " ".join(str(value) for value in key.values())
    print(f"{shown}: {_gist(cell)} ({time.monotonic() - start:.0f} s)", flush=True)
    return cell


def read_cells(file: Path) -> list[dict[str, Any]]:
    """Every finished measurement of a file; a last line that a kill cut short is left out."""
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8").split("\n")[:-1]  # behind the last "\n" there is no whole line
    return [json.loads(line) for line in lines if line]


def run(
    spec: str, file: Path, plan: Plan, *, device: str | None = None, dtype: str | None = None, only: Sequence[str] = ()
) -> None:
    """Makes every measurement of the plan that `file` does not hold yet; `only` names the methods (default: all).

    Raises UserError where the file was begun with another number of threads, or GRADSHIELD_DATA names no folder.
    """
    data_folder()  # says so before anything is measured where there is none
    names = [name for name in ALL if installed(name) and (not only or name in only or name == "forward")]
    missing = [name for name in ALL if not installed(name)]
    if missing:
        print(f"left out, not installed: {', '.join(missing)}", flush=True)
    here = measured(file, {"kind": "machine"}, machine)
    if here["threads"] != torch.get_num_threads():
        raise UserError(f"{file} was begun with {here['threads']} threads: set OMP_NUM_THREADS, or take another --out")
    now = machine()
    for name in ("gpu", "versions"):
        if here[name] != now[name]:
            raise UserError(f"{file} was begun with {name} {here[name]}, not {now[name]}: take another --out")
    task = make_task(open_model(spec, device, dtype), batch_tokens=plan.batch_tokens)
    sizes = (*plan.rows_memory, plan.longest)
    for name in names:
        if plan.memory and name not in plan.memory:
            continue
        for kind, tokens in (("memory", LORA_ROWS * plan.longest), (TIMED, plan.batch_tokens)):
            if kind == TIMED and name not in OURS:
                continue
            if task.model.device.type == "cuda":  # whose allocator tells without a fresh process
                memory = partial(peak, replace(task, batch_tokens=tokens), name, sizes)
            else:
                memory = partial(peak_memory, spec, name, sizes, tokens, device, dtype)
            measured(file, {"kind": kind, "method": name, "rows": [*sizes]}, memory)
    rows = mixed(task.model, *plan.rows_main, plan.longest)
    for repeat in range(plan.repeats):
        for name in names:
            key = {"kind": "pair", "method": name, "rows": len(rows), "longest": plan.longest, "repeat": repeat}
            measured(file, key, partial(pair, task, name, rows, repeat))
    growing = [
        name for name in names if name not in ("full-logits", "activations") and (not plan.grow or name in plan.grow)
    ]
    for key, measure in _growth(task, growing, plan, device, dtype):
        measured(file, key, measure)


def _growth(
    task: Task, names: Sequence[str], plan: Plan, device: str | None, dtype: str | None
) -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
    """(key, measurement) of every point of every curve: seconds against rows, row length, probes and model size."""
    source = chats(task.model, 2 * SHORT * max(plan.rows))  # half of the pieces have no response token
    for name in names:
        for count in plan.rows if name in ("forward", "intent", *OURS) else plan.rows_others:
            yield _key("rows", name, count), partial(_seconds, task, name, pieces(source, SHORT, count))
    for length in plan.lengths:
        rows = pieces(source, length, max(1, plan.length_tokens // length))
        for name in names:
            yield _key("length", name, length), partial(_seconds, task, name, rows)
    requests = [record["prompt"] for record in load_public("advbench")]
    rows = pieces(source, 128, max(1, plan.length_tokens // 128))
    for count in plan.probes:
        many = make_task(task.model, requests[:count], plan.batch_tokens)
        for name in (n for n in OURS if n in names):
            yield _key("probes", name, count), partial(_seconds, many, name, rows)
    for size in plan.sizes:
        drawn = cache(partial(_random_task, size, plan, device, dtype))
        for name in names:
            yield _key("size", name, size), partial(_sized, drawn, name, rows)


def _random_task(size: str, plan: Plan, device: str | None, dtype: str | None) -> Task:
    return make_task(open_model(size, device, dtype), batch_tokens=plan.batch_tokens)


def _sized(drawn: Callable[[], Task], name: str, rows: Sequence[Example]) -> dict[str, Any]:
    return {"weights": weights(drawn().model), **_seconds(drawn(), name, rows)}


def _seconds(task: Task, name: str, rows: Sequence[Example]) -> dict[str, Any]:
    start = time.perf_counter()
    extra = {"rank": task.gradient.rank, "setup": time.perf_counter() - start} if name in OURS else {}
    seconds = [run_once(task, name, rows).seconds or 0.0]
    while len(seconds) < 3 and seconds[0] < SHORT_TIME:
        seconds.append(run_once(task, name, rows).seconds or 0.0)
    return {"seconds": median(seconds), "rows": len(rows), "tokens": tokens_of(rows), **extra}


def _key(axis: str, name: str, x: int | str) -> dict[str, Any]:
    return {"kind": "growth", "axis": axis, "method": name, "x": x}


def _gist(cell: dict[str, Any]) -> str:
    if "error" in cell:
        return cell["error"]
    if "bytes" in cell:
        return f"{cell['bytes'] / 2**20:,.0f} MiB above the model"
    if cell.get("kind") == "pair":
        return f"{cell['seconds'] / cell['forward']:.2f} × forward"
    if cell.get("kind") == "growth":
        return f"{cell['seconds']:.2f} s"
    shown = {k: v for k, v in cell.items() if isinstance(v, float) or k == "threads"}
    return ", ".join(f"{k} {v:.4g}" for k, v in shown.items())
