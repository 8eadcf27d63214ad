"""Limits on what is held in memory at once, applied before it is read: a small file can unpack to gigabytes."""

import json
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from gradshield.base.errors import UserError

MAX_RECORD = 10_000_000  # bytes; a longer record is set aside unread: it is far beyond any context length
MAX_LINE = 64_000_000  # bytes; a longer line is not kept, not even to be set aside: reading stops there
MAX_VALUES = 500_000  # in one JSON record: a value takes two bytes in the file, but up to 200 once it is parsed


def bounded_lines(stream: BinaryIO, name: str) -> Iterator[bytes]:
    """The stream's lines with their ends. Raises UserError at a line over `MAX_LINE`, before it is in memory."""
    for number, line in enumerate(iter(lambda: stream.readline(MAX_LINE + 1), b""), 1):
        if len(line) > MAX_LINE:
            raise too_large(f"{name}:{number}", "line", MAX_LINE)
        yield line


def too_large(place: str, what: str, limit: int) -> UserError:
    """The error for something that is not read because of its size in bytes."""
    return UserError(f"{place}: {what} over the limit of {limit / 1e6:.0f} MB; split it, or take it out of the file")


def load_json(text: str, hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """`json.loads` for a record: raises ValueError, before parsing, where it holds more than `MAX_VALUES` values."""
    if sum(map(text.count, ",[{")) > MAX_VALUES:  # an upper bound, as it counts those in texts, too
        raise ValueError(f"more than {MAX_VALUES:,} values in one record")
    return json.loads(text, object_pairs_hook=hook)


def first_repeated(names: list[str]) -> str | None:
    """The first name that was there before, found in linear time."""
    seen: set[str] = set()
    return next((name for name in names if name in seen or seen.add(name)), None)
