"""Records of one file, format by format: where each starts, its bytes, and what it holds or what is wrong.

A record that can't be used never stops the reading: it comes out with a problem in place of its value.
"""

import base64
import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import PurePath
from typing import Any

from gradshield.base.errors import UserError
from gradshield.data.json_array import read_array
from gradshield.data.sniff import BOM, MAX_RECORD, delimiter, open_bytes

# 1-based line, raw bytes, value, problem; exactly one of the last two is None
Record = tuple[int, bytes, dict | None, str | None]


def read_jsonl(path: PurePath, name: str) -> Iterator[Record]:
    """One record a line, cut at b"\\n" only (U+2028 is no line break); a BOM stays in `raw` only."""
    for line, raw, body in _lines(path):
        yield line, raw, *parse_object(body)


def read_text(path: PurePath, name: str) -> Iterator[Record]:
    """One record `{"text": line}` a line, as `datasets` reads plain text; blank lines are no records."""
    for line, raw, body in _lines(path):
        text, problem = decode(body)
        yield line, raw, None if problem else {"text": text.rstrip("\r\n")}, problem


def read_json(path: PurePath, name: str) -> Iterator[Record]:
    """One record for each element of a JSON array."""
    array = read_array(path, name)
    for line, start, end in array.spans:
        raw = array.bytes_of(start, end)
        yield line, raw, *parse_object(raw)


def read_csv(path: PurePath, name: str) -> Iterator[Record]:
    """One record a CSV record below the header, values as text; quoted fields may span lines."""
    records = csv_records(path, name)
    _, header, columns = next(records, (1, b"", "there is none"))
    problem = columns if isinstance(columns, str) else decode(header)[1]
    if problem is None and len(set(columns)) < len(columns):
        problem = f"column {next(c for c in columns if columns.count(c) > 1)!r} appears twice"
    if problem:
        raise UserError(f"{name}: the header (line 1) can't be used: {problem}; mend the header")
    for line, raw, fields in records:
        problem = fields if isinstance(fields, str) else decode(raw)[1]
        if problem is None and len(fields) != len(columns):
            problem = f"{len(fields)} fields where the header has {len(columns)}"
        yield line, raw, None if problem else dict(zip(columns, fields, strict=True)), problem


def csv_records(path: PurePath, name: str) -> Iterator[tuple[int, bytes, list[str] | str]]:
    """(line, raw bytes, fields or what is wrong) of every CSV record, the header first."""
    csv.field_size_limit(MAX_RECORD)
    taken: list[bytes] = []

    def lines(stream: Iterable[bytes]) -> Iterator[str]:
        for number, raw in enumerate(stream):
            taken.append(raw)
            body = raw.removeprefix(BOM) if number == 0 else raw
            yield body.decode("utf-8", "surrogateescape")

    with open_bytes(path) as stream:
        first = next((raw for raw in stream if raw.removeprefix(BOM).strip()), b"").removeprefix(BOM)
    with open_bytes(path) as stream:
        mark = delimiter(first.decode("utf-8", "replace"), name)
        # Only the strict reader tells of a quote that is never closed; the lenient one swallows the rest.
        reader = csv.reader(lines(stream), delimiter=mark, strict=True)
        line, before = 1, b""
        while True:
            try:
                fields: list[str] | str = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                fields = f"broken CSV record: {error}"
            raw, start = b"".join(taken), line
            line += len(taken)
            taken.clear()
            if raw.removeprefix(BOM).strip(b" \r\n"):
                yield start, before + raw, fields
                before = b""
            elif start == 1 or before:
                before += raw


def read_parquet(path: PurePath, name: str) -> Iterator[Record]:
    """One record a Parquet row as Python values; `raw` is its JSON, for display."""
    import pyarrow.parquet

    # Opened here, since pyarrow takes no name that is not UTF-8.
    with open(path, "rb") as stream, pyarrow.parquet.ParquetFile(stream) as file:
        columns = file.schema_arrow.names
        if len(set(columns)) < len(columns):
            twice = next(column for column in columns if columns.count(column) > 1)
            raise UserError(f"{name}: column {twice!r} appears twice; rename one of them")
        yield from arrow_records(file.iter_batches(batch_size=1000))


def arrow_records(batches: Iterable[Any]) -> Iterator[Record]:
    """Records of Arrow batches; where Python can't hold a value, `raw` is the row as an Arrow IPC stream."""
    line = 0
    for batch in batches:
        encoded = [field for field in batch.schema if _holds_json(field.type)]
        for at, record in enumerate(_python_rows(batch)):
            line += 1
            if isinstance(record, str):
                yield line, _ipc(batch.slice(at, 1)), None, record
                continue
            try:
                decoded = record | {field.name: _decoded(record[field.name], field.type) for field in encoded}
                raw, problem = _shown(decoded), bad_text(decoded)
            except (ValueError, RecursionError):
                raw, problem, decoded = _shown(record), "a column of JSON holds what is not usable JSON", None
            problem = _too_long(raw, "record") or problem
            yield line, raw, None if problem else decoded, problem


def parse_object(raw: bytes) -> tuple[dict | None, str | None]:
    """(the JSON object, None), or (None, why it can't be used)."""
    text, problem = decode(raw)
    if problem:
        return None, problem
    twice: list[str] = []

    def build(pairs: list[tuple[str, Any]]) -> dict:
        built = dict(pairs)
        if len(built) < len(pairs):
            keys = [key for key, _ in pairs]
            twice.append(next(key for key in keys if keys.count(key) > 1))
        return built

    try:
        value = json.loads(text.rstrip(" \t\r\n"), object_pairs_hook=build)
        if not isinstance(value, dict):
            return None, f"not a JSON object but a {type(value).__name__}"
        if twice:
            return None, f"key {twice[0]!r} appears twice in an object"
        problem = bad_text(value) if "\\u" in text else None  # nothing else can bring a NUL or a lone surrogate
    except json.JSONDecodeError as error:
        return None, f"not valid JSON at column {error.colno}: {error.msg}"
    except RecursionError:
        return None, "JSON nested too deeply"
    except ValueError as error:  # an integer of thousands of digits
        return None, f"not usable JSON: {error}"
    return (None, problem) if problem else (value, None)


def decode(raw: bytes) -> tuple[str, str | None]:
    """(text, None), or ("", why these bytes can't be used as text)."""
    problem = _too_long(raw, "line")
    if problem is None and (at := raw.find(b"\0")) >= 0:
        problem = f"NUL character at byte offset {at}"
    if problem:
        return "", problem
    try:
        return raw.decode("utf-8"), None
    except UnicodeDecodeError as error:
        return "", f"invalid UTF-8 at byte offset {error.start}"


def _lines(path: PurePath) -> Iterator[tuple[int, bytes, bytes]]:
    """(line number, the line verbatim, the line without the file's BOM) of every line that is not blank."""
    with open_bytes(path) as stream:
        for line, raw in enumerate(stream, 1):
            body = raw.removeprefix(BOM) if line == 1 else raw
            if body.strip():
                yield line, raw, body


def _too_long(raw: bytes, what: str) -> str | None:
    if len(raw) <= MAX_RECORD:
        return None
    return f"{what} of {len(raw) / 1e6:.0f} MB, over the limit of {MAX_RECORD / 1e6:.0f} MB"


def bad_text(value: Any) -> str | None:
    """Why a text somewhere in the value can't reach a tokenizer: a NUL, or half a surrogate pair."""
    for text in _texts(value):
        if "\0" in text:
            return "NUL character in a text"
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            return f"lone surrogate \\u{ord(text[error.start]):04x} in a text"
    return None


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _python_rows(batch: Any) -> Iterator[dict | str]:
    """The batch's rows, or why Python can't hold one: Arrow checks neither UTF-8 on reading nor what a date can be."""
    try:
        yield from batch.to_pylist()
    except (ValueError, OverflowError, KeyError):
        for at in range(len(batch)):
            try:
                yield batch.slice(at, 1).to_pylist()[0]
            except UnicodeDecodeError:
                yield "invalid UTF-8 in a text column"
            except (ValueError, OverflowError, KeyError) as error:  # a year past 9999, an unknown time zone, ...
                yield f"a column holds what can't be read ({error})"


def _holds_json(kind: Any) -> bool:
    """Whether text in a column of this Arrow type is JSON: so `datasets` stores fields that differ from row to row."""
    inner = (kind.field(n).type for n in range(kind.num_fields))
    return getattr(kind, "extension_name", None) == "arrow.json" or any(map(_holds_json, inner))


def _decoded(value: Any, kind: Any) -> Any:
    """The value with its JSON texts parsed. Raises ValueError or RecursionError where they can't be."""
    if value is not None and getattr(kind, "extension_name", None) == "arrow.json":
        return json.loads(value)
    if isinstance(value, dict):
        return {field.name: _decoded(value[field.name], field.type) for field in kind}
    if isinstance(value, list) and hasattr(kind, "value_type"):
        return [_decoded(item, kind.value_type) for item in value]
    return value


def _ipc(batch: Any) -> bytes:
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, batch.schema) as writer:
        writer.write(batch)
    return sink.getvalue().to_pybytes()


def _shown(record: dict) -> bytes:
    return json.dumps(record, ensure_ascii=False, default=_display).encode("utf-8", "backslashreplace")


def _display(value: Any) -> str:
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)


READERS = {
    "jsonl": read_jsonl,
    "json": read_json,
    "csv": read_csv,
    "text": read_text,
    "parquet": read_parquet,
}
