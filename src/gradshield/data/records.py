"""Records of one file, by format: where each starts, its bytes, and its content or its problem.

An unusable record never stops the reading; it is returned with a problem instead of a value.
"""

import base64
import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import PurePath
from typing import Any

from gradshield.base.errors import UserError
from gradshield.data.json_array import read_array
from gradshield.data.limits import MAX_LINE, MAX_RECORD, MAX_VALUES, bounded_lines, first_repeated, load_json, too_large
from gradshield.data.pages import light_batches, open_parquet, parquet_batches, weight
from gradshield.data.sniff import BOM, delimiter, open_bytes

MAX_HEADER = 1_000_000  # bytes of a CSV header

_NULLS = {  # a CSV field that pandas, with which `datasets` reads CSV, takes for null, quoted or not
    *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA"),
    *("NULL", "NaN", "None", "n/a", "nan", "null"),
}

# 1-based line, raw bytes, value, problem; exactly one of the last two is None
Record = tuple[int, bytes, dict | None, str | None]


def jsonl_records(path: PurePath, name: str) -> Iterator[Record]:
    """One record a line, cut at b"\\n" only (U+2028 is no line break); a BOM stays in `raw` only."""
    with open_bytes(path) as stream:
        for line, raw in enumerate(bounded_lines(stream, name), 1):
            body = raw.removeprefix(BOM) if line == 1 else raw
            if body and not body.isspace():
                yield line, raw, *parse_object(body)


def text_records(path: PurePath, name: str) -> Iterator[Record]:
    """One record `{"text": line}` a line, as `datasets` reads plain text: with its BOM, and blank lines, too."""
    with open_bytes(path) as stream:
        for line, raw in enumerate(bounded_lines(stream, name), 1):
            text, problem = decode(raw)
            text = text.removesuffix("\n").removesuffix("\r")
            if "\r" in text:
                problem = "a carriage return within the line, which trainers take for its end; make it a newline"
            yield line, raw, None if problem else {"text": text}, problem


def json_records(path: PurePath, name: str) -> Iterator[Record]:
    """One record for each element of a JSON array."""
    for line, raw in read_array(path, name):
        yield line, raw, *parse_object(raw)


def csv_file_records(path: PurePath, name: str) -> Iterator[Record]:
    """One record a CSV record below the header, values as text; quoted fields may span lines.

    A blank field and each of `_NULLS` is null, as `datasets` reads them.
    """
    records = csv_records(path, name)
    _, header, columns = next(records, (1, b"", "there is none"))
    problem = columns if isinstance(columns, str) else decode(header)[1]
    if problem is None and (twice := first_repeated(list(columns))) is not None:
        problem = f"column {twice!r} appears twice"
    if problem:
        raise UserError(f"{name}: the header (line 1) can't be used: {problem}; fix the header")
    for line, raw, fields in records:
        problem = fields if isinstance(fields, str) else decode(raw)[1]
        if problem is None and len(fields) != len(columns):
            problem = f"{len(fields)} fields where the header has {len(columns)}"
        filled = (None if field in _NULLS else field for field in fields)
        yield line, raw, None if problem else dict(zip(columns, filled, strict=True)), problem


def csv_records(path: PurePath, name: str) -> Iterator[tuple[int, bytes, list[str] | str]]:
    """(line, raw bytes, fields or what is wrong) of every CSV record, the header first."""
    csv.field_size_limit(MAX_RECORD)
    taken: list[bytes] = []
    line, size, marks = 1, 0, 0  # of the record that is read
    with open_bytes(path) as stream:
        stripped = (raw.removeprefix(BOM) for raw in bounded_lines(stream, name))
        first = next((raw for raw in stripped if not raw.isspace()), b"")
    if len(first) > MAX_HEADER:
        raise too_large(f"{name}:1", "header", MAX_HEADER)
    mark = delimiter(first.decode("utf-8", "replace"), name)

    def next_line() -> str | None:  # no generator, since one ends when it raises
        nonlocal size, marks
        raw = next(lines, None)
        if raw is None:
            return None
        taken.append(raw)
        size, marks = size + len(raw), marks + raw.count(mark.encode())
        if size > MAX_RECORD:
            raise csv.Error(f"record over the limit of {MAX_RECORD / 1e6:.0f} MB; is a quote not closed?")
        if marks > MAX_VALUES:
            raise csv.Error(f"more than {MAX_VALUES:,} fields")
        return (raw.removeprefix(BOM) if line == len(taken) == 1 else raw).decode("utf-8", "surrogateescape")

    with open_bytes(path) as stream:
        lines = bounded_lines(stream, name)
        # Only the strict reader tells of a quote that is never closed; the lenient one swallows the rest.
        reader = csv.reader(iter(next_line, None), delimiter=mark, strict=True)
        before = bytearray()
        while True:
            try:
                fields: list[str] | str = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                fields = f"broken CSV record: {error}"
            raw, start = b"".join(taken), line
            line, size, marks = line + len(taken), 0, 0
            taken.clear()
            if (raw.removeprefix(BOM) if start == 1 else raw).strip(b" \r\n"):
                yield start, bytes(before) + raw, fields
                before.clear()
            elif start == 1 or before:
                before += raw
                if len(before) > MAX_HEADER:
                    raise too_large(f"{name}:{start}", "blank lines before the header", MAX_HEADER)


def parquet_file_records(path: PurePath, name: str) -> Iterator[Record]:
    """One record a Parquet row as Python values; `raw` is its JSON, for display."""
    with open_parquet(path) as file:
        twice = first_repeated(file.schema_arrow.names)
        if twice is not None:
            raise UserError(f"{name}: column {twice!r} appears twice; rename one of them")
        for field in file.schema_arrow:
            if _holds_view(field.type):
                raise UserError(f"{name}: column {field.name!r} is a list view; write it as a list")
        yield from arrow_records(batch for _, batch in parquet_batches(path, name))


def arrow_records(batches: Iterable[Any]) -> Iterator[Record]:
    """Records of Arrow batches; where Python can't hold a value, `raw` is the row as an Arrow IPC stream."""
    line = 0
    for batch in light_batches(batches):
        if len(batch) == 1 and weight(batch) > MAX_LINE:
            line += 1
            yield line, b"", None, f"record over the limit of {MAX_RECORD / 1e6:.0f} MB"
            continue
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
    """(the JSON object, None), or (None, the problem)."""
    text, problem = decode(raw)
    if problem:
        return None, problem
    twice: list[str | None] = []

    def build(pairs: list[tuple[str, Any]]) -> dict:
        built = dict(pairs)
        if len(built) < len(pairs) and not twice:
            twice.append(first_repeated([key for key, _ in pairs]))
        return built

    try:
        value = load_json(text.rstrip(" \t\r\n"), build)
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
    """(text, None), or ("", the problem with these bytes)."""
    problem = _too_long(raw, "line")
    if problem is None and (at := raw.find(b"\0")) >= 0:
        problem = f"NUL character at byte offset {at}"
    if problem:
        return "", problem
    try:
        return raw.decode("utf-8"), None
    except UnicodeDecodeError as error:
        return "", f"invalid UTF-8 at byte offset {error.start}"


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


def _holds_view(kind: Any) -> bool:
    """Whether a column of this Arrow type has a list view in it, which pyarrow writes to no Parquet file."""
    inner = (kind.field(n).type for n in range(kind.num_fields))
    return str(kind).startswith(("list_view<", "large_list_view<")) or any(map(_holds_view, inner))


def _decoded(value: Any, kind: Any) -> Any:
    """The value with its JSON texts parsed. Raises ValueError or RecursionError where they can't be."""
    if value is not None and getattr(kind, "extension_name", None) == "arrow.json":
        return load_json(value)
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
    "jsonl": jsonl_records,
    "json": json_records,
    "csv": csv_file_records,
    "text": text_records,
    "parquet": parquet_file_records,
}
