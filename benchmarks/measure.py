"""One measurement at a time: seconds of a method beside a forward pass, and its peak memory in a process of its own."""

import ctypes
import gc
import importlib
import importlib.util
import io
import json
import os
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.methods import METHODS, Method, Outcome, Task, make_task
from benchmarks.models import open_model
from benchmarks.peers import PEERS
from benchmarks.rows import mixed, tokens_of
from gradshield.base.errors import UserError
from gradshield.data.encode import Example

ALL: dict[str, Method] = {**METHODS, **PEERS}
PACKAGES = ("torch", "transformers", "trl", "peft", "bergson", "kronfluence")
ROOT = Path(__file__).parent.parent
LORA_ROWS = 8  # of a step; memory is compared at as many tokens at once
_warm: set[tuple[str, str]] = set()


def installed(name: str) -> bool:
    """Whether what the method needs is there."""
    return all(importlib.util.find_spec(module.partition(".")[0]) for module in ALL[name].needs)


def run_once(task: Task, name: str, rows: Sequence[Example]) -> Outcome:
    """The method's outcome on `rows` with its seconds; opening it, and what only the first call does, is not timed."""
    method = ALL[name]
    if (name, task.model.name) not in _warm:
        with _silent(), method.open(task, rows[:1]) as run:
            run()
        _warm.add((name, task.model.name))
    with _silent(), method.open(task, rows) as run:
        gc.collect()
        _wait(task.model.device)
        start = time.perf_counter()
        outcome = run()
        _wait(task.model.device)
        seconds = time.perf_counter() - start
    return Outcome(outcome.scores, outcome.seconds or seconds)


def pair(task: Task, name: str, rows: Sequence[Example], repeat: int) -> dict[str, Any]:
    """Seconds of the method and of a forward pass on the same rows, one right after the other, in alternating order.

    The first repeat keeps the scores. A method that does not fit into memory yields {"error"}.
    """
    seconds, scores = {}, None
    load = loaded()
    for each in ("forward", name) if repeat % 2 == 0 else (name, "forward"):
        try:
            outcome = run_once(task, each, rows)
        except (torch.OutOfMemoryError, MemoryError, UserError) as error:
            return _too_large(error)
        seconds[each] = outcome.seconds
        if each == name:
            scores = outcome.scores
    cell = {"seconds": seconds[name], "forward": seconds["forward"], "tokens": tokens_of(rows), "load": load}
    return cell | ({"scores": [float(f"{x:.9g}") for x in scores]} if repeat == 0 and scores is not None else {})


def _too_large(error: BaseException) -> dict[str, Any]:
    """The cell of a method that does not fit; a mistake of the user's is no measurement and is raised again."""
    if isinstance(error, UserError) and "memory" not in str(error):
        raise error
    return {"error": "out of memory"}


def loaded() -> float:
    """The load average of the last minute; says on stderr when others are computing, too."""
    load = os.getloadavg()[0]
    if load > torch.get_num_threads() + 0.7:
        print(f"warning: load average {load:.1f}: other processes are running, so ratios are rough", file=sys.stderr)
    return round(load, 2)


def machine() -> dict[str, Any]:
    """What the figures depend on: threads, processor or GPU, versions."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"threads": torch.get_num_threads(), "cores": os.cpu_count(), "gpu": gpu, "versions": versions}


def peak_memory(
    spec: str, name: str, rows: tuple[int, int, int], batch_tokens: int, device: str | None, dtype: str | None
) -> dict[str, Any]:
    """{"bytes"}: the peak above the loaded model of a method in a fresh process (`rows` as `mixed` takes them)."""
    order = {"spec": spec, "name": name, "rows": rows, "tokens": batch_tokens, "device": device, "dtype": dtype}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.measure", json.dumps(order)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == -9:
        return {"error": "killed: out of memory"}
    lines = [line for line in done.stdout.split("\n") if line.startswith("{")]
    if done.returncode or not lines:
        raise UserError(f"memory of {name}: {(done.stderr.strip().split(chr(10)) or ['died'])[-1][:200]}")
    return json.loads(lines[-1])


def child(order: Mapping[str, Any]) -> dict[str, Any]:
    """What `peak_memory` has done in the fresh process."""
    model = open_model(order["spec"], order["device"], order["dtype"])
    return peak(make_task(model, batch_tokens=order["tokens"]), order["name"], order["rows"])


def peak(task: Task, name: str, rows: tuple[int, int, int]) -> dict[str, Any]:
    """{"bytes"}: the peak above the loaded model; on a CPU, of what this process ever held, on a GPU, of its
    allocator."""
    method, model = ALL[name], task.model
    examples = mixed(model, *rows)
    for module in method.needs:
        importlib.import_module(module)
    for weight in model.net.parameters():
        weight.sum()  # weights that are mapped from a file are in memory now
    on_gpu = model.device.type == "cuda"
    task = replace(task)  # its own gradient of the probe
    gc.collect()
    before = torch.cuda.memory_allocated() if on_gpu else _reset_peak()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    try:
        with _silent(), method.open(task, examples) as run:
            run()
    except (torch.OutOfMemoryError, MemoryError, UserError) as error:
        return _too_large(error)
    return {"bytes": (torch.cuda.max_memory_allocated() if on_gpu else _peak()) - before}


def _reset_peak() -> int:
    """Bytes resident now, as much as can be given back given back; the high-water mark starts from here."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().split("\n"):
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _silent() -> Iterator[None]:
    """Swallows progress lines and notices of whatever runs within."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), warnings.catch_warnings(action="ignore"):
        yield


if __name__ == "__main__":
    print(json.dumps(child(json.loads(sys.argv[1]))))
