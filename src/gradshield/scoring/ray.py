"""Scoring on a Ray cluster: Ray Data passes blocks of batches to one actor per device, and the results are journaled
here.

So the output has the same bytes as with the local engine, either engine can resume a run of the other, and only the
driver needs the run folder. If an actor or node dies, Ray scores the block that it was working on again.
"""

import gc
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from functools import cached_property
from itertools import chain, islice
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import TypeAdapter

from gradshield.base.errors import UserError, one_line
from gradshield.data.encode import Example
from gradshield.data.formats import Conversation
from gradshield.scoring.base import ScoreFunction, Scores
from gradshield.scoring.engine import Batch, Engine, as_json, fit_to_memory, from_json

BLOCK = 16  # batches handed out at once
PART_BYTES = 1 << 30  # of the rows that Ray is given at once, some 250 million tokens
MISTAKE = -1  # in the place of a batch's number: what a worker's UserError says, which would not survive as one


def ray_engine(build: Callable[[], ScoreFunction], files: Iterable[Path], workers: int | None = None) -> Engine:
    """The engine whose actors score with what `build` returns there. These cache files are sent along.

    The cluster is RAY_ADDRESS's, or else all of this machine; `workers` is the number of actors (default: one per
    GPU, or per machine without GPUs).

    Raises UserError for what goes wrong in an actor.
    """
    known = {f.name: f.read_bytes() for f in files if f.is_file()}

    def run(batches: Iterable[Batch]) -> Iterator[tuple[int, Scores]]:
        blocks = _blocks(batches)
        first = next(blocks, None)
        if first is None:
            return
        blocks = chain([first], blocks)
        with _cluster() as (gpus, cores):
            while part := list(_up_to(blocks, PART_BYTES)):  # each has its actors, so that memory stays flat
                yield from _scored(part, build, known, workers or gpus or len(cores), gpus, cores)

    return run


@contextmanager
def _cluster() -> Iterator[tuple[int, list[int]]]:
    """Connects to the cluster, or starts one: (its GPUs, the CPUs of each node that lends any)."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray Data's threads may ask for something after the cluster was given back, and would start another one for it.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    import ray
    from ray.data import DataContext

    ours = not ray.is_initialized()
    if ours:
        address = os.environ.get("RAY_ADDRESS") or "local"  # or Ray waits for the last cluster here, dead or not
        try:
            ray.init(address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError) as error:
            why = one_line(error, 150)
            ask = "is it up, and RAY_AUTH_MODE as it wants it?"
            raise UserError(f"--engine ray: no cluster at {address} ({why}); {ask}") from error
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    DataContext.get_current().enable_progress_bars = False
    try:
        gpus = int(ray.cluster_resources().get("GPU", 0))
        cores = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
        cores = [count for count in cores if count]  # a head often lends none
        if not gpus and not cores:
            raise UserError("--engine ray: the cluster has no free GPU or CPU")
        yield gpus, cores
    finally:
        if ours:
            # Ray collects garbage in a thread of its own, and what it finalises after the shutdown ends this process.
            gc.collect()
            ray.shutdown()


def _scored(
    blocks: list[pa.Table],
    build: Callable[[], ScoreFunction],
    known: dict[str, bytes],
    workers: int,
    gpus: int,
    cores: list[int],
) -> Iterator[tuple[int, Scores]]:
    """The scores of the blocks' batches, by actors of their own."""
    import ray
    from ray.data import ActorPoolStrategy

    count = min(workers, len(blocks))
    each: dict[str, Any] = {"num_gpus": 1} if gpus else {"num_cpus": max(1, min(cores) // ceil(count / len(cores)))}
    found = ray.data.from_arrow(blocks).map_batches(
        _Worker,
        fn_constructor_args=(build, known, each.get("num_cpus")),
        batch_size=None,  # a block as it is
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=count),
        **each,
    )
    blocks.clear()  # they are in Ray's store
    mistake = ""
    try:
        with redirect_stdout(sys.stderr):  # where Ray says that a worker died
            for row in found.iter_rows():  # to its end: shut down in the midst of it, Ray ends this process
                if row["number"] == MISTAKE:
                    mistake = row["columns"]
                else:
                    yield row["number"], from_json(json.loads(row["columns"]))
    finally:
        found = None  # before `_cluster` collects garbage
    if mistake:
        raise UserError(mistake)


def _up_to(blocks: Iterator[pa.Table], size: int) -> Iterator[pa.Table]:
    """The next blocks, until they hold so many bytes."""
    held = 0
    for block in blocks:
        yield block
        held += block.nbytes
        if held >= size:
            return


class _Worker:
    """One model on one device, with its scorer."""

    def __init__(self, build: Callable[[], ScoreFunction], known: Mapping[str, bytes], threads: int | None) -> None:
        self.build, self.known, self.threads, self.mistake = build, known, threads, ""

    @cached_property
    def scorer(self) -> Callable[[Sequence[Example]], Scores]:
        """Made at the first block, as Ray makes an actor again and again that dies while it is made."""
        import torch

        if self.threads:
            torch.set_num_threads(self.threads)
        with tempfile.TemporaryDirectory() as cache:  # so that no worker finds out again what the driver knows
            for name, content in self.known.items():
                Path(cache, name).write_bytes(content)
            os.environ["GRADSHIELD_CACHE"] = cache
            return fit_to_memory(self.build())

    def __call__(self, block: pa.Table) -> pa.Table:
        if self.mistake:  # what follows need not be tried, as its scores would help nobody
            return pa.table({"number": [MISTAKE], "columns": [self.mistake]})
        numbers, starts, counts = np.unique(block["number"].to_numpy(), return_index=True, return_counts=True)
        try:
            found = {int(n): self._batch(block.slice(start, count)) for n, start, count in zip(numbers, starts, counts)}
        except UserError as error:
            self.mistake = str(error)
            found = {MISTAKE: self.mistake}
        return pa.table({"number": list(found), "columns": list(found.values())})

    def _batch(self, rows: pa.Table) -> str:
        """The columns of one batch, as JSON, which keeps every digit."""
        batch = [
            Example(row, np.array(ids, dtype=np.int32), np.array(mask), _conversation(said))
            for row, ids, mask, said in zip(*(rows[name].to_pylist() for name in ("row", "ids", "mask", "said")))
        ]
        return json.dumps(as_json(self.scorer(batch)))


def _blocks(batches: Iterable[Batch]) -> Iterator[pa.Table]:
    """The examples of every 16 batches as a table."""
    rest = iter(batches)
    while some := list(islice(rest, BLOCK)):
        flat = [(number, e) for number, batch in some for e in batch]
        columns = {"number": [number for number, _ in flat], "row": [e.row for _, e in flat]}
        said = pa.array(
            [json.dumps(asdict(e.conversation), default=str) if e.conversation else None for _, e in flat], pa.string()
        )
        yield pa.table({**columns, "ids": [e.ids for _, e in flat], "mask": [e.mask for _, e in flat], "said": said})


def _conversation(said: str | None) -> Conversation | None:
    return TypeAdapter(Conversation).validate_json(said) if said else None
