"""The format of a file, detected from its bytes, since names can be wrong (a `.jsonl` that is one array)."""

import csv
import io
import json
import re
from pathlib import PurePath
from typing import Any, BinaryIO

from gradshield.base.errors import UserError
from gradshield.data.limits import MAX_RECORD, load_json

FORMATS = ("jsonl", "json", "csv", "parquet", "text")
SUFFIXES = {
    "jsonl": (".jsonl", ".ndjson", ".jsonlines"),
    "json": (".json",),
    "csv": (".csv", ".tsv"),
    "parquet": (".parquet", ".pq"),
    "text": (".txt", ".md"),
}
BOM = b"\xef\xbb\xbf"

_HEAD = 1 << 16
_PACKED = {rb"\x1f\x8b": "gzip", rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18": "zstd"}  # or zstd's skippable frame
_FOREIGN = {
    b"PK\x03\x04": "a zip archive or Excel sheet; unpack it or save it as csv",
    b"ARROW1": "an Arrow file; save it as parquet",
    b"\xff\xfe\0\0": "UTF-32 text; convert it to UTF-8, e.g. with iconv",
    b"\xff\xfe": "UTF-16 text; convert it to UTF-8, e.g. with iconv",
    b"\xfe\xff": "UTF-16 text; convert it to UTF-8, e.g. with iconv",
    b"BZh": "a bzip2 file; unpack it",
    b"\xfd7zXZ\0": "an xz file; unpack it",
    b"\x04\x22\x4d\x18": "an lz4 file; unpack it",
    b"version https://git-lfs": "a Git LFS pointer; fetch the file itself with git lfs pull",
}
# What is under these keys is of one row: a list of objects there is not the rows of a file.
ROW = {"messages", "conversations", "conversation", "prompt", "completion", "chosen", "rejected", "tools", "functions"}
ROW |= {"instruction", "input", "output", "question", "query", "response", "answer", "text", "content", "transcript"}


def open_bytes(path: str | PurePath) -> BinaryIO:
    """The file's bytes as a buffered stream; gzip and zstd, detected by magic bytes, are unpacked."""
    stream = open(path, "rb")  # noqa: SIM115  # the caller closes it
    codec = next((name for magic, name in _PACKED.items() if re.match(magic, stream.peek(4))), None)
    if codec is None:
        return stream
    stream.close()
    import pyarrow

    # Opened here, since pyarrow takes no name that is not UTF-8.
    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(open(path, "rb")), codec))


def plain_name(name: str) -> str:
    """The name without `.gz` or `.zst`: outputs are written unpacked."""
    return re.sub(r"\.(gz|zst)$", "", name, flags=re.IGNORECASE)


def suffix(name: str) -> str:
    """The lower-case suffix that indicates the format: `.jsonl` for `a.JSONL.gz`."""
    return PurePath(plain_name(name)).suffix.lower()


def detect_format(path: str | PurePath, name: str) -> str:
    """One of `FORMATS`, from the first bytes; `name` is what messages call the file and gives the suffix.

    Raises UserError for an empty file and for one in no known format.
    """
    with open_bytes(path) as stream:
        head = stream.read(_HEAD)
    if head.startswith(b"PAR1"):
        return "parquet"
    for magic, what in _FOREIGN.items():
        if head.startswith(magic):
            raise UserError(f"{name}: this is {what}")
    if re.match(rb"(\0[^\0]){2}|([^\0]\0){2}", head):
        raise UserError(f"{name}: this is UTF-16 text; convert it to UTF-8, e.g. with iconv")
    body = head.removeprefix(BOM).lstrip()
    if not body:
        raise UserError(f"{name}: the file is empty; give a file with at least one row")
    ending = suffix(name)
    if ending in SUFFIXES["text"]:
        return "jsonl" if is_object(body.split(b"\n", 1)[0]) else "text"
    if body.startswith(b"["):
        return "json"
    if body.startswith(b"{"):
        return "json" if _is_one_object(path) else "jsonl"
    if ending in SUFFIXES["jsonl"] and re.search(rb"^\s*\{", body, re.MULTILINE):
        return "jsonl"  # the first line is broken, later ones are not
    if ending in SUFFIXES["csv"] or _looks_like_csv(head):
        return "csv"
    known = ", ".join(FORMATS)
    raise UserError(f"{name}: unknown format; convert it to one of {known}, or set `format` (in a --config file)")


def is_object(line: bytes) -> bool:
    """Whether the line is one JSON object."""
    try:
        return isinstance(load_json(line.decode()), dict)
    except (ValueError, RecursionError):
        return False


def holds_rows(key: str, value: Any) -> bool:
    """Whether `{key: value}` wraps a file's rows: a list of objects that are not of one row."""
    if key in ROW or not isinstance(value, list):
        return False
    return bool(value) and all(isinstance(item, dict) for item in value)


def delimiter(header: str, name: str) -> str:
    """The comma (of `.tsv` the tab), as trainers read it, if it makes columns of the header line; else the one of
    comma, tab and semicolon that makes most.

    Raises UserError where the line is no CSV, as for a file whose lines end in "\\r" only.
    """
    order = "\t,;" if suffix(name) == ".tsv" else ",\t;"
    try:
        columns = {mark: len(next(csv.reader([header], delimiter=mark), [])) for mark in order}
        return order[0] if columns[order[0]] > 1 else max(order, key=lambda mark: columns[mark])
    except csv.Error as error:
        why = str(error).split(" - ")[0]  # what follows is for programmers
        raise UserError(f"{name}: the first line is not CSV ({why}); lines must end in a newline") from None


def _is_one_object(path: str | PurePath) -> bool:
    """For a file that opens with `{`: whether it is one object around the rows rather than JSON lines."""
    with open_bytes(path) as stream:
        first = b""
        while not first.removeprefix(BOM).strip():
            first = stream.readline(MAX_RECORD)
        rest = stream.read(_HEAD)
    first = first.removeprefix(BOM)
    if len(first) > MAX_RECORD - len(BOM):
        return _opens_rows(first.lstrip()[:_HEAD].decode("utf-8", "replace"))
    if is_object(first):
        around = json.loads(first)
        return not rest.strip() and not ROW & set(around) and any(map(holds_rows, around, around.values()))
    # A broken first line of JSON lines is followed by other objects; an object spread over lines is not, or only by
    # those in its list, with a comma behind each but the last.
    lines = [line.rstrip() for line in rest.split(b"\n") if line.strip()]
    objects = [line for line in lines if line.startswith(b'{"')]
    closed = len(rest) == _HEAD or lines[-1:] != objects[-1:]
    inside = (
        closed and first.rstrip().endswith((b"{", b"[", b",")) and all(line.endswith(b",") for line in objects[:-1])
    )
    return bool(lines) and (not objects or inside)


def _opens_rows(text: str) -> bool:
    """Whether the beginning of a line too long to be parsed is that of an object around the rows of a file."""
    decoder, blank = json.JSONDecoder(), re.compile(r"[\s:,]*")
    at = 1
    while True:
        try:
            key, at = decoder.raw_decode(text, blank.match(text, at).end())  # type: ignore[union-attr]
            at = blank.match(text, at).end()  # type: ignore[union-attr]
            if re.match(r"\[\s*\{", text[at : at + 1000]):
                return key not in ROW
            _, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError, TypeError):
            return False


def _looks_like_csv(head: bytes) -> bool:
    """Whether text of unknown suffix has a header of two columns or more and a first record as wide."""
    if b"\0" in head:
        return False
    text = head.removeprefix(BOM).decode("utf-8", "replace")
    try:
        mark = delimiter(text.split("\n", 1)[0], "")
        records = csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True)
        widths = [len(fields) for fields, _ in zip(records, range(2), strict=False)]
    except (csv.Error, UserError):
        return False
    return len(widths) == 2 and widths[0] == widths[1] >= 2
