"""Examples in a temporary file, and their encoding in several processes, so that memory use does not grow with the
file.

An example takes 20 bytes in memory: its row, its position in the file and its length.
"""

import os
import signal
import sys
import tempfile
import warnings
from array import array
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import chain, islice
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import numpy as np

from gradshield.base.errors import UserError
from gradshield.data.columns import Column
from gradshield.data.encode import Example
from gradshield.data.rows import Row

R = TypeVar("R")
CHUNK, CHUNK_BYTES = 256, 1 << 22  # rows that a process is given at once
MIN_ROWS_FOR_WORKERS = 2000  # rows that are done here before other processes are worth their start


class Examples(Column[Example]):
    """Examples in a temporary file without a name, which disappears when the process ends."""

    def __init__(self) -> None:
        with _writing():
            self._file = tempfile.TemporaryFile(buffering=0, prefix="gradshield-")  # noqa: SIM115  # as long as this
        self._rows, self._starts, self._lengths = array("q"), array("q"), array("i")
        self._end = 0

    def append(self, example: Example) -> None:
        data = example.ids.astype(np.int32, copy=False).tobytes() + example.mask.tobytes()
        with _writing():
            self._file.write(data)
        self._rows.append(example.row)
        self._starts.append(self._end)
        self._lengths.append(len(example.ids))
        self._end += len(data)

    @property
    def rows(self) -> np.ndarray:
        """int64 [examples]: the row of each example."""
        return np.array(self._rows, dtype=np.int64)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [examples]: the number of tokens of each example."""
        return np.array(self._lengths, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._rows)

    def _at(self, n: int) -> Example:
        length = self._lengths[n]
        data = bytearray(os.pread(self._file.fileno(), 5 * length, self._starts[n]))  # torch takes what is writable
        mask = np.frombuffer(data, dtype=bool, offset=4 * length)
        return Example(self._rows[n], np.frombuffer(data, dtype=np.int32, count=length), mask)


@contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = tempfile.gettempdir()
        raise UserError(f"{where}: can't be written ({error.strerror}); free some space or set TMPDIR") from None


def row_numbers(examples: Sequence[Example]) -> np.ndarray:
    """int64 [examples]: the row of each example."""
    return examples.rows if isinstance(examples, Examples) else np.array([e.row for e in examples], dtype=int)


def token_counts(examples: Sequence[Example]) -> np.ndarray:
    """int64 [examples]: the number of tokens of each example."""
    return examples.lengths if isinstance(examples, Examples) else np.array([len(e.ids) for e in examples], dtype=int)


def in_processes(work: Callable[[Row], R], rows: Iterable[Row]) -> Generator[tuple[Row, R], None, None]:
    """Each row with the result of `work`, in order, computed by one process per CPU.

    The first rows are processed here, as are all rows on systems without a safe fork. Errors of `work` are raised here.
    """
    rows = iter(rows)
    for row in islice(rows, MIN_ROWS_FOR_WORKERS):
        yield row, work(row)
    count = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
    first = next(rows, None)
    if first is None:
        return
    rows = chain([first], rows)
    if count == 1:
        yield from ((row, work(row)) for row in rows)
        return
    with _workers(work, count) as free:
        busy: deque[tuple[Connection, list[Row]]] = deque()  # oldest first, so that rows stay in order
        while True:
            chunk = list(_chunk(rows))
            if busy and not (chunk and free):
                link, sent = busy.popleft()
                yield from zip(sent, _received(link))
                free.append(link)
            elif not chunk:
                return
            if chunk:
                link = free.pop()
                link.send([replace(row, raw=b"") for row in chunk])
                busy.append((link, chunk))


def _chunk(rows: Iterator[Row]) -> Iterator[Row]:
    size = 0
    for row in islice(rows, CHUNK):
        yield row
        size += len(row.raw)
        if size > CHUNK_BYTES:
            return


def _received(link: Connection) -> list[Any]:
    try:
        done, result = link.recv()
    except EOFError:
        raise UserError("a process that encodes rows was killed, probably out of memory; run it again") from None
    if not done:
        raise result
    return result


@contextmanager
def _workers(work: Callable[[Row], R], count: int) -> Iterator[list[Connection]]:
    from multiprocessing import get_context

    context = get_context("fork")  # so that the tokenizer need not be sent; nothing but it is used there
    links: list[Connection] = []
    processes = []
    try:
        for _ in range(count):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(work, there, [*links, here]), daemon=True)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which are not used there
                process.start()
            there.close()
            links.append(here)
            processes.append(process)
        yield list(links)
    finally:
        for link in links:
            link.close()
        for process in processes:
            process.kill()
            process.join()


def _serve(work: Callable[[Row], R], link: Connection, others: list[Connection]) -> None:
    """Works until the other side closes the connection, which also happens if that process is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process says what is to be said
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
    for other in others:
        other.close()
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            rows = link.recv()
            try:
                link.send((True, [work(row) for row in rows]))
            except (BrokenPipeError, ConnectionResetError):
                raise
            except Exception as error:
                link.send((False, error))
