"""Where each element of a JSON array lies in its file, so that rows can be written back byte for byte."""

import json
import re
from pathlib import PurePath
from typing import NamedTuple

from gradshield.base.errors import UserError
from gradshield.data.sniff import ROW, holds_rows, open_bytes

MAX_ARRAY = 2_000_000_000  # bytes of a JSON array, which is read whole; no other format has such a bound

# Python's limit on the digits of an int concerns a row, not the file: numbers stay text in finding spans.
_DECODER = json.JSONDecoder(parse_int=str)
_blank = re.compile(r"[ \t\n\r]*").match


class Array(NamedTuple):
    """A file's text and the places in it: `text[start:end]` of each span is one element."""

    text: str  # bytes that are not UTF-8 are carried as surrogates ("surrogateescape")
    spans: list[tuple[int, int, int]]  # (1-based line, start, end)
    opened: int  # just after the `[`
    closed: int  # at the `]`

    def bytes_of(self, start: int | None, end: int | None) -> bytes:
        """The file's own bytes between two places."""
        return self.text[start:end].encode("utf-8", "surrogateescape")


def read_array(path: str | PurePath, name: str) -> Array:
    """The array in a file that is a JSON array, or an object with the rows under one key such as "data".

    Raises UserError with line and column where the JSON breaks, and for a file over `MAX_ARRAY`.
    """
    with open_bytes(path) as stream:
        data = stream.read(MAX_ARRAY + 1)
    if len(data) > MAX_ARRAY:
        size = f"{MAX_ARRAY / 1e9:.0f} GB"
        raise UserError(f"{name}: a JSON array over {size}; convert it to jsonl, e.g. with jq -c '.[]'")
    text = data.decode("utf-8", "surrogateescape")
    del data
    try:
        start = _skip(text, 1 if text.startswith("\ufeff") else 0)
        if text.startswith("{", start):
            start = _find_rows(text, start, name)
        array = _spans(text, start)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{name}: broken JSON at {where} ({error.msg}); mend it there") from None
    except RecursionError:
        raise UserError(f"{name}: JSON nested too deeply; convert the file to jsonl") from None
    return array


def _skip(text: str, at: int) -> int:
    return _blank(text, at).end()  # type: ignore[union-attr]  # the pattern matches everywhere


def _expect(text: str, at: int, marks: str) -> str:
    """The one of `marks` that stands at this place."""
    found = text[at : at + 1]
    if not found:
        raise json.JSONDecodeError("the file ends too early", text, at)
    if found not in marks:
        raise json.JSONDecodeError(f"expected {' or '.join(marks)}", text, at)
    return found


def _spans(text: str, start: int) -> Array:
    """The elements of the array that opens at `start`; after a top-level array nothing may follow."""
    _expect(text, start, "[")
    spans, line, counted = [], 1, 0
    at = _skip(text, start + 1)
    while text[at : at + 1] != "]" or spans:  # an empty array closes at once; after a comma an element must come
        _, end = _DECODER.raw_decode(text, at)
        line, counted = line + text.count("\n", counted, at), at
        spans.append((line, at, end))
        at = _skip(text, end)
        if _expect(text, at, ",]") == "]":
            break
        at = _skip(text, at + 1)
    rest = _skip(text, at + 1)
    if text[_skip(text, text.startswith("\ufeff"))] == "[" and rest < len(text):
        raise json.JSONDecodeError("text after the end of the array", text, rest)
    return Array(text, spans, start + 1, at)


def _find_rows(text: str, start: int, name: str) -> int:
    """The place of the `[` of the only list of rows in the object that opens at `start`.

    What stands around it is written into every output, so nothing there may be rows to a reader of another mind.
    """
    found: dict[str, int] = {}
    others: dict[str, bool] = {}  # whether what is there may be rows, too
    at = _skip(text, start + 1)
    while _expect(text, at, '"}') == '"':
        key, end = _DECODER.raw_decode(text, at)
        at = _skip(text, end)
        _expect(text, at, ":")
        at = _skip(text, at + 1)
        value, end = _DECODER.raw_decode(text, at)
        if key in found or key in others:
            raise UserError(f"{name}: key {key!r} appears twice in the object around the rows; mend it")
        if holds_rows(key, value):
            found[key] = at
        else:
            others[key] = key in ROW or (isinstance(value, list) and bool(value))
        at = _skip(text, end)
        if _expect(text, at, ",}") == "}":
            break
        at = _skip(text, at + 1)
    if _skip(text, at + 1) < len(text):
        raise json.JSONDecodeError("text after the end of the object", text, _skip(text, at + 1))
    if len(found) != 1:
        what = f"lists of rows under several keys ({', '.join(found)})" if found else "no list of rows in it"
        raise UserError(f"{name}: one JSON object with {what}; give an array of rows, or one row a line (jsonl)")
    if doubtful := next((key for key, may_be in others.items() if may_be), None):
        raise UserError(f"{name}: {doubtful!r} beside a list of rows may be rows, too; give an array of rows alone")
    return next(iter(found.values()))
