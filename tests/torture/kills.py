"""Every command killed, or left without disk space, at every one of its file operations: the same command then ends
with the bytes of a run that nobody disturbed, and nothing else is left."""

import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from gradshield.base.storage import LOCK
from torture.commands import Command, prepare, start, tree
from torture.faults import install
from torture.process import Ended, apart

KILLED = -9


def campaign(work: Path, full: bool, points: int | None, only: str = "") -> Iterator[tuple[str, Counter[str]]]:
    """Each command, or the one named, and what came out: "resumed", and "failed: ..." for what must not be.

    `full`: the disk is full from the n-th operation on; else a kill there. `points` is how many places are tried in a
    command (None: all)."""
    results: dict[str, Path] = {}
    commands = {command.name: command for command in prepare(work)}
    needed, name = set(), only or None
    while name:
        needed.add(name)
        name = commands[name].before
    for command in commands.values():
        if needed and command.name not in needed:
            continue
        if command.costly and command.name != only and points is not None and points < 10:
            continue
        place = work / "undisturbed" / command.name.replace(" ", "-")
        start(command, results, place)
        shutil.rmtree(work / "cache-0", ignore_errors=True)  # as later, so that the operations counted are all of them
        ended = _faulty(command, place, work / "cache-0", 0, full)
        if ended.code or not ended.clean:
            raise RuntimeError(f"{command.name} does not work undisturbed: {ended.said[-2000:]}")
        results[command.name] = place
        if only not in ("", command.name):
            continue
        found = Counter(_tried(command, results, work, at, full) for at in _spread(int(ended.answer), points))
        yield command.name, found + Counter(operations=int(ended.answer))


def _tried(command: Command, results: dict[str, Path], work: Path, at: int, full: bool) -> str:
    place, cache = work / "disturbed", work / "cache-1"
    start(command, results, place)
    shutil.rmtree(cache, ignore_errors=True)
    what = f"{command.name} at operation {at}"
    ended = _faulty(command, place, cache, at, full)
    if full and not (ended.clean and ended.code in (0, 2)):
        return f"failed: {what}: exit {ended.code}: {ended.said[-300:]!r}"
    *before, last = ended.said.strip().splitlines() or [""]
    trials = [line for line in before if line.split()[:1] in (["trial"], ["1"])]  # tune prints them as they end
    if full and ended.code == 2 and (before != trials or not last.startswith("gradshield: ")):
        return f"failed: {what}: more than one line: {ended.said[-300:]!r}"
    if not full and ended.code != KILLED:
        return f"failed: {what}: exit {ended.code} instead of a kill: {ended.said[-300:]!r}"
    again = _faulty(command, place, cache, 0, full)
    if again.code or not again.clean:
        return f"failed: {what}: it does not resume: {again.said[-300:]!r}"
    wanted, there = tree(results[command.name]), tree(place)
    if wanted != there:
        differ = sorted(name for name in wanted.keys() | there.keys() if wanted.get(name) != there.get(name))
        return f"failed: {what}: other bytes than undisturbed in {', '.join(differ[:5])}"
    left = [file.name for file in cache.glob(".*") if file.name != LOCK]  # which the next write there removes
    return f"failed: {what}: left in the cache: {left}" if left else "resumed"


def _faulty(command: Command, place: Path, cache: Path, at: int, full: bool) -> Ended:
    def work() -> int:
        os.environ["GRADSHIELD_CACHE"] = str(cache)
        faults = install(at, full)
        try:
            command.work()
        except SystemExit as stop:
            if stop.code:
                raise
        return faults.count

    return apart(work, place)


def _spread(operations: int, points: int | None) -> Iterable[int]:
    if points is None or points >= operations:
        return range(1, operations + 1)
    return sorted({1 + round(n * (operations - 1) / (points - 1)) for n in range(points)})
