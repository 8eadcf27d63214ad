"""Rows → kept / quarantined / set aside, each row in the bytes it came in.

The source is read a second time, so memory stays flat. All files are written in a hidden folder beside
their place and moved there at the end, `kept` last: where `kept` stands, the rest stands too.
"""

import base64
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
from gradshield.data.json_array import read_array
from gradshield.data.records import csv_records
from gradshield.data.rows import Row, Source, fingerprint, read_part
from gradshield.data.sniff import SUFFIXES, plain_name, suffix

VERDICTS = ("kept", "quarantined", "set aside")
_SET_ASIDE = "set_aside.jsonl"


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
        why = "disk full; free some space" if full else f"can't be written ({error.strerror or error}); mend that"
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
    if fingerprint(source) != source.sha256:
        raise UserError(f"{source.path}: the data changed during the run; run again on what is there now")


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
                    _write_parquet(source.files[part], verdicts[first : counts.total()], outs)
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
    """The rows of one file that are kept or quarantined, with their verdict; others go to `log`."""
    for row in read_part(source, part, first):
        verdict = verdicts[row.index] if row.index < len(verdicts) else None
        if verdict not in VERDICTS:
            raise RuntimeError(f"row {row.index} has the verdict {verdict!r}, which is none of {', '.join(VERDICTS)}")
        counts[verdict] += 1
        advance(0, 1)
        if verdict != "set aside":
            yield verdict, row
            continue
        reason = reasons.get(row.index) or row.problem or "not scored"
        entry = {"source": row.source, "line": row.line, "reason": reason}
        try:
            entry["raw"] = row.raw.decode("utf-8")
        except UnicodeDecodeError:
            entry["raw_base64"] = base64.b64encode(row.raw).decode()
        # A file's name need not be UTF-8; what can't be encoded is escaped as JSON escapes it.
        log.write(json.dumps(entry, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")


def _write_bytes(source: Source, part: int, rows: Iterator[tuple[str, Row]], outs: Mapping[str, BinaryIO]) -> None:
    """Rows verbatim, in the frame of their format: a CSV header, a JSON array's brackets and commas."""
    head, tail = b"", b""
    if source.format == "csv":
        _, head, _ = next(csv_records(source.files[part], source.names[part]))
    elif source.format == "json":
        array = read_array(source.files[part], source.names[part])
        head, tail = array.bytes_of(None, array.opened) + b"\n", b"\n" + array.bytes_of(array.closed, None)
        del array
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


def _write_parquet(file: Path, verdicts: Sequence[str], outs: Mapping[str, BinaryIO]) -> None:
    """Rows of a Parquet file with its schema, metadata and compression, one row group at a time."""
    import pyarrow
    import pyarrow.parquet

    with file.open("rb") as raw, pyarrow.parquet.ParquetFile(raw) as source, ExitStack() as stack:
        codec = source.metadata.row_group(0).column(0).compression if source.num_row_groups else "SNAPPY"
        writers = {
            verdict: stack.enter_context(
                pyarrow.parquet.ParquetWriter(
                    out, source.schema_arrow, compression="NONE" if codec == "UNCOMPRESSED" else codec
                )
            )
            for verdict, out in outs.items()
        }
        start = 0
        for group in range(source.num_row_groups):
            table = source.read_row_group(group)
            part = np.array(verdicts[start : start + len(table)])
            start += len(table)
            for verdict, writer in writers.items():
                if len(rows := np.flatnonzero(part == verdict)):
                    writer.write_table(_taken(table, rows))


def _taken(table: Any, rows: np.ndarray) -> Any:
    """The rows of the table, also where `take` does not know a column's type: then by runs of neighbours."""
    import pyarrow

    try:
        return table.take(rows)
    except pyarrow.ArrowNotImplementedError:
        runs = np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1)
        return pyarrow.concat_tables([table.slice(run[0], len(run)) for run in runs])
