"""Runs parts of the campaign and prints what came out; exit code 1 where something failed."""

import argparse
import io
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # else it warns in every fork

PARTS = ("kills", "disks", "wrecks", "mutations", "bombs", "models")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m torture", description=__doc__)
    parser.add_argument("part", nargs="*", help="parts to run, as kills or kills:apply (default: all)")
    parser.add_argument("--short", action="store_true", help="a few minutes in all, as in CI")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a file of JSON lines that gets one line a part")
    given = parser.parse_args()
    if unknown := [part for part in given.part if part.split(":")[0] not in PARTS]:
        parser.error(f"{unknown[0]}: no such part; there are {', '.join(PARTS)}")
    failed = 0
    print("| part | command | tried | failed | seconds |\n|---|---|---|---|---|", flush=True)
    for part in given.part or PARTS:
        with tempfile.TemporaryDirectory(prefix="torture-") as work:
            os.environ["GRADSHIELD_CACHE"] = f"{work}/cache"
            failed += _reported(part, given, Path(work))
    return bool(failed)


def _reported(part: str, given: argparse.Namespace, work: Path) -> int:
    """Runs the part; prints a line for each of its commands as it ends, or one for all; returns how much failed."""
    failed, begin = 0, time.monotonic()
    words = f"python -m torture {part}{' --short' if given.short else ''} --seed {given.seed}"
    for command, found in _part(part, given.short, given.seed)(work):
        name = f"{part.split(':')[0]}: {command}" if command else part
        operations = found.pop("operations", 0)
        wrong = [what for what in found if what.startswith("failed")]
        failed += (count := sum(found[what] for what in wrong))
        tried, seconds = sum(found.values()), round(time.monotonic() - begin)
        of = f" of {operations:,} operations" if operations else ""
        print(f"| {name} | `{words}` | {tried:,}{of} | {count} | {seconds} |", flush=True)
        if given.out:
            line = {"part": name, "command": words, "tried": tried, "failed": count, "seconds": seconds}
            sound = {what: n for what, n in found.items() if what not in wrong}
            more = {"operations": operations or None, "ended": sound, "failures": wrong}
            with given.out.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line | more) + "\n")
        for what in wrong[:20]:
            print(what, file=sys.stderr, flush=True)
        begin = time.monotonic()
    return failed


def _part(part: str, short: bool, seed: int) -> Callable[[Path], Iterable[tuple[str, Counter[str]]]]:
    """The part's campaign: each command's name, or none, and what came out. Each part imports only what it needs."""
    points = 4 if short else None
    part, _, only = part.partition(":")
    if part in ("kills", "disks"):
        from torture import kills

        return lambda work: kills.campaign(work, part == "disks", points, only)
    if part == "wrecks":
        from torture import wrecks

        return lambda work: [("", wrecks.campaign(30 if short else 500, seed, work))]
    if part == "mutations":
        from torture import mutations

        return lambda work: [("", mutations.campaign(1000 if short else 10_000, seed, work))]
    if part == "bombs":
        from torture import bombs

        return lambda work: [("", bombs.campaign(work, short))]
    from torture import models

    def hostile(_: Path) -> list[tuple[str, Counter[str]]]:
        with redirect_stdout(io.StringIO()):
            ended = models.campaign(40 if short else 1000, seed)
        return [("", Counter({k if k in ("ok", "refused") else f"failed: {k}": n for k, n in ended.items() if n}))]

    return hostile


if __name__ == "__main__":
    sys.exit(main())
