"""Limits on data in memory, applied before reading: a small file can unpack to gigabytes."""

import json
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from gradshield.base.errors import UserError

MAX_RECORD = 10_000_000  # bytes; a longer record is set aside unread: it is far beyond any context length
MAX_LINE = 64_000_000  # bytes; a longer line is not kept, not even to be set aside: reading stops there
MAX_VALUES = 500_000  # in one JSON record: a value takes two bytes in the file, but up to 200 once it is parsed
MAX_DEPTH = 100  # lists and objects within one another in a record: pickle and templates go less deep than json does


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
    """`json.loads` for a record: raises ValueError, before parsing, where it holds more than `MAX_VALUES` values, and
    RecursionError where they are nested deeper than `MAX_DEPTH`."""
    opened = text.count("[") + text.count("{")  # an upper bound, as it counts those in texts, too
    if opened + text.count(",") > MAX_VALUES:
        raise ValueError(f"more than {MAX_VALUES:,} values in one record")
    value = json.loads(text, object_pairs_hook=hook)
    if opened > MAX_DEPTH and _deeper(value, MAX_DEPTH):
        raise RecursionError
    return value


def _deeper(value: Any, limit: int) -> bool:
    """Whether lists and objects are nested deeper than the limit, checked level by level without recursion."""
    level = [value]
    for _ in range(limit):
        inner = (each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list))
        level = [item for items in inner for item in items]
    return any(isinstance(each, dict | list) for each in level)


def first_repeated(names: list[str]) -> str | None:
    """The first name that occurs twice, found in linear time."""
    seen: set[str] = set()
    return next((name for name in names if name in seen or seen.add(name)), None)
