"""Rows → kept / quarantined / set aside, each row in the bytes it came in.

The source is read a second time, so memory stays flat. All files are written in a hidden folder beside
their place and moved there at the end, `kept` last: where `kept` stands, the rest stands too.
"""

import base64
import codecs
import errno
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gradshield.base.errors import UserError
from gradshield.base.progress import Advance, progress
from gradshield.data.json_array import read_frame
from gradshield.data.pages import light_batches, open_parquet, parquet_batches, take_rows
from gradshield.data.records import csv_records
from gradshield.data.rows import Row, Source, current_sha256, read_part
from gradshield.data.sniff import SUFFIXES, plain_name, suffix

VERDICTS = ("kept", "quarantined", "set aside")
ROW_GROUP = 5_000_000  # bytes of rows held before they are written as a row group
_SET_ASIDE = "set_aside.jsonl"
_PIECE = 1 << 20


def write_outputs(
    source: Source, verdicts: Sequence[str], reasons: Mapping[int, str], folder: str | Path
) -> dict[str, int]:
    """Writes kept, quarantined and set_aside.jsonl into `folder`; returns how many rows went to each verdict.

    `verdicts[i]` is the verdict of row i, `reasons[i]` why it is set aside (else its own problem is given).
    A file gives kept.<ext> and quarantined.<ext>, a folder gives kept/ and quarantined/ with its paths below.
    Raises UserError when the source changed since it was opened, when the folder holds another run's outputs,
    when the disk is full; RuntimeError unless rows in = kept + quarantined + set aside.
    """
    folder = Path(folder)
    names = {verdict: _names(source, verdict) for verdict in ("quarantined", "kept")}
    _check_folder(source, folder, [name for each in names.values() for name in each])
    _check_unchanged(source)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".writing-*"):  # of a call that was killed
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=".writing-", dir=folder) as temporary:
            counts = _write_all(source, verdicts, reasons, names, Path(temporary))
            _check_unchanged(source)
            for name in [_SET_ASIDE, *names["quarantined"], *names["kept"]]:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(Path(temporary, name), folder / name)
    except OSError as error:  # what goes wrong in reading is a UserError already
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        why = "disk full; free some space" if full else f"can't be written ({error.strerror or error}); fix that"
        raise UserError(f"{folder}: {why}, or choose another output folder") from None
    return counts


def _names(source: Source, verdict: str) -> list[str]:
    """The output file of this verdict for each file of the source, relative to the output folder."""
    if source.folder:
        return [f"{verdict}/{plain_name(name)}" for name in source.names]
    endings = SUFFIXES["jsonl" if source.format == "hub" else source.format]
    ending = suffix(source.names[0])
    return [verdict + (ending if ending in endings else endings[0])]


def _check_folder(source: Source, folder: Path, names: list[str]) -> None:
    """Nothing of the input is overwritten, and no file of an earlier run is left among the new ones."""
    if len(set(names)) < len(names):
        raise UserError(f"{source.path}: two files differ only in .gz or .zst; remove one of them")
    inputs = {file.resolve() for file in source.files}
    targets = {folder / name for name in names}
    if any(target.resolve() in inputs for target in targets):
        raise UserError(f"{folder}: the outputs would overwrite the input; choose another output folder")
    known = {ending for endings in SUFFIXES.values() for ending in endings}
    for verdict in ("kept", "quarantined"):
        there = [*folder.glob(f"{verdict}.*"), *(folder / verdict).rglob("*")]
        for file in there:
            if file.is_file() and suffix(file.name) in known and file not in targets:
                old = file.relative_to(folder)
                raise UserError(f"{folder}: already holds {old} of other data; choose an empty folder")


def _check_unchanged(source: Source) -> None:
    if current_sha256(source) != source.sha256:
        raise UserError(f"{source.path}: the data changed during the run; run the command again")


def _write_all(
    source: Source,
    verdicts: Sequence[str],
    reasons: Mapping[int, str],
    names: dict[str, list[str]],
    place: Path,
) -> dict[str, int]:
    counts: Counter[str] = Counter()
    with open(place / _SET_ASIDE, "wb") as log, progress("writing", 0, len(verdicts)) as advance:
        for part in range(len(source.names)):
            with ExitStack() as stack:
                outs = {}
                for verdict, each in names.items():
                    (place / each[part]).parent.mkdir(parents=True, exist_ok=True)
                    outs[verdict] = stack.enter_context(open(place / each[part], "wb"))
                first = counts.total()
                rows = _judged(source, part, first, verdicts, reasons, log, counts, advance)
                if source.format == "parquet":
                    for _ in rows:
                        pass
                    _write_parquet(source, part, verdicts[first : counts.total()], outs)
                else:
                    _write_bytes(source, part, rows, outs)
    if counts.total() != len(verdicts):
        rule = "rows in must be kept + quarantined + set aside"
        raise RuntimeError(f"{len(verdicts)} verdicts for {counts.total()} rows: {rule}")
    return {verdict: counts[verdict] for verdict in VERDICTS}


def _judged(
    source: Source,
    part: int,
    first: int,
    verdicts: Sequence[str],
    reasons: Mapping[int, str],
    log: BinaryIO,
    counts: Counter[str],
    advance: Advance,
) -> Iterator[tuple[str, Row]]:
    """The rows of one file that are kept or quarantined, with their verdict; the others are written to `log`."""
    for row in read_part(source, part, first):
        verdict = verdicts[row.index] if row.index < len(verdicts) else None
        if verdict not in VERDICTS:
            raise RuntimeError(f"row {row.index} has the verdict {verdict!r}, not one of {', '.join(VERDICTS)}")
        counts[verdict] += 1
        advance(0, 1)
        if verdict != "set aside":
            yield verdict, row
            continue
        reason = reasons.get(row.index) or row.problem or "not scored"
        log.writelines(_entry({"source": row.source, "line": row.line, "reason": reason}, row.raw))


def _entry(fields: dict[str, Any], raw: bytes) -> Iterator[bytes]:
    """A line of set_aside.jsonl, in pieces, as a row may be long."""
    # A file's name need not be UTF-8; what can't be encoded is escaped as JSON escapes it.
    yield json.dumps(fields, ensure_ascii=False).encode("utf-8", "backslashreplace")[:-1]
    try:
        for _ in _texts(raw):
            pass
        yield b', "raw": "'
        for text in _texts(raw):
            yield json.dumps(text, ensure_ascii=False).encode()[1:-1]
    except UnicodeDecodeError:
        yield b', "raw_base64": "'
        for at in range(0, len(raw), 3 * _PIECE):
            yield base64.b64encode(raw[at : at + 3 * _PIECE])
    yield b'"}\n'


def _texts(raw: bytes) -> Iterator[str]:
    """The bytes as text, in pieces. Raises UnicodeDecodeError where they are no UTF-8."""
    decode = codecs.getincrementaldecoder("utf-8")().decode
    for at in range(0, len(raw), _PIECE):
        yield decode(raw[at : at + _PIECE], at + _PIECE >= len(raw))


def _write_bytes(source: Source, part: int, rows: Iterator[tuple[str, Row]], outs: Mapping[str, BinaryIO]) -> None:
    """Rows verbatim, in the frame of their format: a CSV header, a JSON array's brackets and commas."""
    head, tail = b"", b""
    if source.format == "csv":
        _, head, _ = next(csv_records(source.files[part], source.names[part]))
    elif source.format == "json":
        frame = read_frame(source.files[part], source.names[part])
        head, tail = frame.head + b"\n", b"\n" + frame.tail
    for out in outs.values():
        out.write(head)
    before: dict[str, bytes | None] = dict.fromkeys(outs)
    for verdict, row in rows:
        last = before[verdict]
        if last is not None:
            outs[verdict].write(b",\n" if source.format == "json" else b"" if last.endswith(b"\n") else b"\n")
        outs[verdict].write(row.raw)
        before[verdict] = row.raw
    for verdict, out in outs.items():
        if source.format == "hub" and before[verdict] is not None:
            out.write(b"\n")
        out.write(tail)


def _write_parquet(source: Source, part: int, verdicts: Sequence[str], outs: Mapping[str, BinaryIO]) -> None:
    """Rows of a Parquet file with its schema, metadata and compression, in row groups of its own or smaller."""
    import pyarrow.parquet

    with open_parquet(source.files[part]) as file:
        schema = file.schema_arrow
        codec = file.metadata.row_group(0).column(0).compression if file.num_row_groups and len(schema) else "SNAPPY"
    codec = "NONE" if codec == "UNCOMPRESSED" else codec
    with ExitStack() as stack:
        writers = {
            verdict: stack.enter_context(pyarrow.parquet.ParquetWriter(out, schema, compression=codec))
            for verdict, out in outs.items()
        }
        waiting: dict[str, list] = {verdict: [] for verdict in outs}
        start = last = 0
        for group, batch in parquet_batches(source.files[part], source.names[part]):
            piece = np.array(verdicts[start : start + len(batch)])
            start += len(batch)
            for verdict, writer in writers.items():
                held = waiting[verdict]
                if group != last:
                    _flush(held, writer)
                if len(rows := np.flatnonzero(piece == verdict)):
                    for light in light_batches([take_rows(batch, rows)]):
                        held.append(light)
                        if sum(table.nbytes for table in held) > ROW_GROUP:
                            _flush(held, writer)
            last = group
        for verdict, writer in writers.items():
            _flush(waiting[verdict], writer)


def _flush(held: list, writer: Any) -> None:
    """Writes the collected rows as one row group."""
    import pyarrow

    if held:
        table = pyarrow.Table.from_batches(held)
        writer.write_table(table.cast(writer.schema))
        held.clear()
        del table
        pyarrow.default_memory_pool().release_unused()  # or what large rows took stays taken
