"""Batches scored on a Ray cluster: Ray Data hands blocks of them to one actor a device; the results are journaled here.

So the bytes are those of the local engine, a run that was begun by one engine is finished by the other, and only the
driver needs the run folder. A dead actor or node costs the block that it had in hand: Ray scores that one again.
"""

import gc
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import redirect_stdout
from functools import cached_property
from itertools import islice
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from gradshield.base.errors import UserError
from gradshield.data.encode import Example
from gradshield.scoring.engine import Batch, Engine, Scorer, fitting
from gradshield.scoring.reference import cache_folder

BLOCK = 16  # batches handed out at once
MISTAKE = -1  # in the place of a batch's number: what a worker's UserError says, which would not survive as one


def ray_engine(build: Callable[[], Scorer], fingerprint: str, workers: int | None = None) -> Engine:
    """The engine whose actors score with what `build` returns there; what is known here of the model with this
    fingerprint is sent along. The cluster is RAY_ADDRESS's, or else all of this machine; `workers` is the number of
    actors (default: one a GPU, else one a machine).

    Raises UserError for what goes wrong in an actor.
    """
    known = {f.name: f.read_text(encoding="utf-8") for f in cache_folder().glob(f"*-{fingerprint}-*.json")}

    def run(batches: Iterable[Batch]) -> Iterator[tuple[int, Mapping[str, np.ndarray]]]:
        blocks = list(_blocks(batches))
        if blocks:
            yield from _on_cluster(blocks, build, known, workers)

    return run


def _on_cluster(
    blocks: list[pa.Table], build: Callable[[], Scorer], known: dict[str, str], workers: int | None
) -> Iterator[tuple[int, Mapping[str, np.ndarray]]]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray Data's threads may ask for something after the cluster was given back, and would start another one for it.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    ours = not ray.is_initialized()
    if ours:
        address = os.environ.get("RAY_ADDRESS") or "local"  # or Ray waits for the last cluster here, dead or not
        try:
            ray.init(address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError) as error:
            why = " ".join(str(error).split())[:150]
            ask = "is it up, and RAY_AUTH_MODE as it wants it?"
            raise UserError(f"--engine ray: no cluster at {address} ({why}); {ask}") from error
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    DataContext.get_current().enable_progress_bars = False
    try:
        held = ray.cluster_resources()
        gpus = int(held.get("GPU", 0))
        cores = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
        cores = [count for count in cores if count]  # a head often lends none
        if not gpus and not cores:
            raise UserError("--engine ray: the cluster has neither a GPU nor a CPU to lend")
        count = min(workers or gpus or len(cores), len(blocks))
        each: dict[str, Any] = {"num_gpus": 1} if gpus else {"num_cpus": max(1, min(cores) // ceil(count / len(cores)))}
        found = ray.data.from_arrow(blocks).map_batches(
            _Worker,
            fn_constructor_args=(build, known, each.get("num_cpus")),
            batch_size=None,  # a block as it is
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=count),
            **each,
        )
        with redirect_stdout(sys.stderr):  # where Ray says that a worker died
            mistake = ""
            for row in found.iter_rows():  # to its end: shut down in the midst of it, Ray ends this process
                if row["number"] == MISTAKE:
                    mistake = row["columns"]
                else:
                    yield row["number"], json.loads(row["columns"])
        if mistake:
            raise UserError(mistake)
    finally:
        if ours:
            # Ray collects garbage in a thread of its own, and what it finalises after the shutdown ends this process.
            found = None
            gc.collect()
            ray.shutdown()


class _Worker:
    """One model on one device, with its scorer."""

    def __init__(self, build: Callable[[], Scorer], known: Mapping[str, str], threads: int | None) -> None:
        self.build, self.known, self.threads, self.mistake = build, known, threads, ""

    @cached_property
    def scorer(self) -> Scorer:
        """Made at the first block, as Ray makes an actor again and again that dies while it is made."""
        import torch

        if self.threads:
            torch.set_num_threads(self.threads)
        with tempfile.TemporaryDirectory() as cache:  # so that no worker finds out again what the driver knows
            for name, content in self.known.items():
                Path(cache, name).write_text(content, encoding="utf-8")
            os.environ["GRADSHIELD_CACHE"] = cache
            return fitting(self.build())

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
            Example(row, np.array(ids, dtype=np.int32), np.array(mask))
            for row, ids, mask in zip(*(rows[name].to_pylist() for name in ("row", "ids", "mask")))
        ]
        return json.dumps({name: [float(v) for v in values] for name, values in self.scorer(batch).items()})


def _blocks(batches: Iterable[Batch]) -> Iterator[pa.Table]:
    """The examples of every 16 batches as a table."""
    rest = iter(batches)
    while some := list(islice(rest, BLOCK)):
        flat = [(number, e) for number, batch in some for e in batch]
        columns = {"number": [number for number, _ in flat], "row": [e.row for _, e in flat]}
        yield pa.table({**columns, "ids": [e.ids for _, e in flat], "mask": [e.mask for _, e in flat]})
