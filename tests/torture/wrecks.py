"""Finished and half-finished run folders with a file torn, emptied, replaced or turned into a link: every command says
so in one line or does its work, follows no link and shows no traceback."""

import os
import random
import shutil
from collections import Counter
from pathlib import Path

from torture.commands import Command, prepare, start
from torture.process import Ended, apart

KINDS = ("cut", "empty", "flip", "noise", "link", "folder", "pipe", "gone")


def campaign(count: int, seed: int, work: Path) -> Counter[str]:
    """Tries `count` wrecks; the counter has "survived", and "failed: ..." for what must not be."""
    found: Counter[str] = Counter()
    commands = {command.name: command for command in prepare(work) if not command.costly}
    results: dict[str, Path] = {}
    for command in commands.values():
        place = work / "undisturbed" / command.name.replace(" ", "-")
        start(command, results, place)
        _run(command, place, work)
        results[command.name] = place
    outside = work / "outside"
    for case in range(count):
        draw = random.Random(f"{seed} {case}")
        command = commands[draw.choice([name for name in commands if name != "check"])]
        place = work / "wrecked"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(results[command.name], place)
        outside.write_bytes(b"mine")
        file = draw.choice(sorted(f for f in place.rglob("*") if f.is_file()))
        kind = draw.choice(KINDS)
        _wreck(file, kind, outside, draw)
        ended = _run(command, place, work)
        what = f"case {case} of seed {seed}: {command.name}, {file.name}: {kind}"
        if not ended.clean or ended.code not in (0, 2):
            found[f"failed: {what}: exit {ended.code}: {ended.said[-300:]!r}"] += 1
        elif outside.read_bytes() != b"mine":
            found[f"failed: {what}: the link was followed"] += 1
        elif left := _unfinished(place) - _unfinished(results[command.name]):
            found[f"failed: {what}: left {left}"] += 1
        else:
            found["survived"] += 1
    return found


def _unfinished(folder: Path) -> set[str]:
    """The files that are written beside their place have names with a dot."""
    return {file.relative_to(folder).as_posix() for file in folder.rglob(".*")}


def _wreck(file: Path, kind: str, outside: Path, draw: random.Random) -> None:
    data = file.read_bytes()
    if kind in ("link", "folder", "pipe", "gone"):
        file.unlink()
    if kind == "link":
        file.symlink_to(outside)
    elif kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "cut":
        file.write_bytes(data[: draw.randrange(len(data) + 1)])
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "noise":
        file.write_bytes(draw.randbytes(draw.randrange(1, 200)))
    elif kind == "flip" and data:
        place = draw.randrange(len(data))
        file.write_bytes(data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :])


def _run(command: Command, place: Path, work: Path) -> Ended:
    def inner() -> None:
        os.environ["GRADSHIELD_CACHE"] = str(work / "cache")
        command.work()

    return apart(inner, place, 600)
