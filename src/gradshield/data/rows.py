"""Files → rows. Every row keeps its bytes and its place, so that kept rows are written back unchanged.

Opening only detects the format and computes the checksum. Rows are then streamed, as often as needed.
"""

import atexit
import hashlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from gradshield.base.errors import UserError, one_line
from gradshield.data.arrow_folder import compressed_file
from gradshield.data.records import READERS, arrow_records
from gradshield.data.sniff import FORMATS, SUFFIXES, detect_format, suffix


@dataclass(frozen=True)
class Row:
    """One record of the input; exactly one of `record` and `problem` is None."""

    index: int  # 0-based position in the whole input
    source: str  # path relative to the input folder, or the file's name; "-" for stdin; the Hub dataset's id
    line: int  # 1-based line where the record starts; parquet and Hub: record number
    raw: bytes  # the record verbatim; parquet and Hub: its JSON, for display
    record: dict | None
    problem: str | None  # why it can't be used


@dataclass(frozen=True)
class Source:
    """One opened input; reading it again gives the same rows."""

    path: str  # as the user gave it
    files: tuple[Path, ...]  # none for a `datasets` dataset; for stdin the temporary copy
    names: tuple[str, ...]  # `Row.source` of each file's rows
    format: str  # "jsonl" | "json" | "csv" | "parquet" | "text" | "hub"
    sha256: str  # a file: of its bytes; folder: of the list `sha256sum` prints; Hub: the dataset's fingerprint
    folder: bool = False
    split: str = "train"  # for a `datasets` dataset


def expanded(path: str | Path) -> Path:
    """The path with ~ replaced by the user's home; unchanged if there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def open_source(
    path: str | Path, format: str | None = None, split: str = "train", out: str | Path | None = None
) -> Source:
    """Opens a file, a folder of files in one format, stdin ("-"), a `datasets` folder or a Hub dataset id.

    The format is detected from the content unless `format` names it; in a folder, `format` picks the files to read.
    `split` is for datasets, also for a folder of parquet files as they lie on the Hub. `out` is the run's own folder,
    which may lie in the input and is no part of it. Raises UserError when there is nothing readable there, or when
    another run's folder lies there.
    """
    path = str(path)
    if not path:
        raise UserError("the path of the rows is empty; name a file, a folder or a Hub dataset")
    if format is not None and format not in FORMATS:
        raise UserError(f"unknown format {format!r}; use one of {', '.join(FORMATS)}")
    place = expanded(path)
    with _readable(path):
        if path == "-":
            if sys.stdin is None:
                raise UserError("stdin is closed; name a file instead of -")
            return _open_files(path, [(_spool(sys.stdin.buffer), "-")], format)
        if place.is_dir():
            if (place / "state.json").exists() or (place / "dataset_dict.json").exists():
                return _open_dataset(path, split)
            return _open_folder(path, place, format, split, out)
        if place.is_file():
            return _open_files(path, [(place, place.name)], format)
        if place.exists():  # a pipe such as /dev/stdin or <(...), which can be read only once
            with open(place, "rb") as stream:
                return _open_files(path, [(_spool(stream), place.name)], format)
    known = {ending for endings in SUFFIXES.values() for ending in endings}
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) and suffix(path) not in known:
        return _open_dataset(path, split)
    raise UserError(f"{path}: no such file or folder; check the path")


def read_rows(source: Source) -> Iterator[Row]:
    """Streams the rows of all files in order; memory stays flat, whatever the format.

    A row that can't be read carries a problem. Raises UserError where a file as a whole is broken.
    """
    index = 0
    for part in range(len(source.names)):
        for row in read_part(source, part, index):
            yield row
            index = row.index + 1


def read_part(source: Source, part: int, first: int) -> Iterator[Row]:
    """The rows of the source's file number `part`; `first` is the index of the first of them."""
    name = source.names[part]
    with _readable(name):
        if source.format == "hub":
            data = load_dataset(source.path, source.split).with_format("arrow")
            records = arrow_records(batch for table in data.iter(batch_size=1000) for batch in table.to_batches())
        else:
            records = READERS[source.format](source.files[part], name)
        for index, (line, raw, record, problem) in enumerate(records, first):
            yield Row(index, name, line, raw, record, problem)


def current_sha256(source: Source) -> str:
    """The source's current `sha256`, to compare with the one computed on opening."""
    if source.format == "hub":
        return load_dataset(source.path, source.split)._fingerprint
    with _readable(source.path):
        return _sha256(source.files, source.names, source.folder)


def load_dataset(path: str, split: str) -> Any:
    """The `datasets.Dataset` in a `save_to_disk` folder or under a Hub id; UserError if there is none."""
    import datasets

    if not expanded(path).exists():
        try:
            return datasets.load_dataset(path, split=split, streaming=False)
        except Exception as error:  # offline, gated, no such id or split, several configurations: all kinds are raised
            why = one_line(error)
            if why.startswith("Unknown split"):
                raise UserError(f"{path}: {why}; name one with --split") from None
            if why.startswith("Config name is missing"):
                raise UserError(f"{path}: {why}; save the one you mean with save_to_disk and give its folder") from None
            raise UserError(
                f"{path}: neither a local path nor a reachable dataset ({why}); check the id and the connection, or "
                "download it and give its folder"
            ) from None
    try:
        packed = compressed_file(expanded(path))
        data = None if packed else datasets.load_from_disk(str(expanded(path)))
    except Exception as error:
        why = one_line(error)
        raise UserError(f"{path}: can't be loaded as a `datasets` folder ({why}); save it again") from None
    if packed:
        raise UserError(
            f"{packed}: compressed, so it could take any amount of memory; load it and call save_to_disk again"
        )
    if not isinstance(data, datasets.DatasetDict):
        return data
    if split not in data:
        raise UserError(f"{path}: no split {split!r}; choose one of {', '.join(map(str, data))}")
    return data[split]


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Turns an error while reading a file into a one-line UserError that names the file."""
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error).split("\n")[0]
        raise UserError(f"{name}: can't be read ({why}); check the file and its permissions") from None
    except Exception as error:
        told = isinstance(error, UnicodeDecodeError)  # a parquet column's name
        if not told and type(error).__module__ != "pyarrow.lib":  # ArrowInvalid and its kin, without importing pyarrow
            raise
        why = str(error).split("\n")[0]
        raise UserError(f"{name}: not a readable parquet or compressed file ({why}); write it again") from None


def _open_files(path: str, files: list[tuple[Path, str]], format: str | None) -> Source:
    (file, name) = files[0]
    shown = "stdin" if path == "-" else path
    if file.stat().st_size == 0:
        raise UserError(f"{shown}: the file is empty; give a file with at least one row")
    format = format or detect_format(file, shown)
    return Source(path, (file,), (name,), format, _sha256((file,), (name,), False))


def _raise(error: OSError) -> None:
    raise error


def _of_run(folder: Path) -> bool:
    """Whether a run of ours is described there; others' files may have these names, and then hide no rows."""
    for file in (folder / "run.yaml", folder / "eval.yaml"):
        if file.is_file():
            with file.open("rb") as stream:
                head = stream.read(1 << 20)
            if all(re.search(line, head, re.M) for line in (rb"^model:", rb"^  fingerprint:", rb"^versions:")):
                return True
    return False


def _is_read(folder: Path, path: str, out: str | Path | None) -> bool:
    """Whether a folder below the input holds rows of it. Raises UserError if it holds another run: that run's copies of
    rows, or its answers, must not be screened, and the user must be told of them."""
    if folder.name.startswith("."):
        return False
    this, own = os.path.realpath(folder), out and os.path.realpath(expanded(out))
    if this == own:
        return False
    if not _of_run(folder):
        return True
    if own == os.path.join(this, "screen"):  # what `tune` filters, in its own folder
        return False
    raise UserError(f"{folder}: a run of GradShield; move it out of {path}, or give the files by name")


def _open_folder(path: str, place: Path, wanted: str | None, split: str, out: str | Path | None) -> Source:
    found = []
    for parent, folders, names in os.walk(place, onerror=_raise):
        folders[:] = [name for name in folders if _is_read(Path(parent, name), path, out)]
        found += [Path(parent, name) for name in names if not name.startswith(".")]
    found = [file for file in found if file.is_file() and file.stat().st_size]  # empty parts hold no rows
    text = [file for file in found if suffix(file.name) in SUFFIXES["text"]]
    data = [file for file in found if any(suffix(file.name) in SUFFIXES[kind] for kind in FORMATS if kind != "text")]
    files = text if wanted == "text" else data or text  # a README beside data is no data
    known = {*data, *text}
    endings = {ending for kind in FORMATS for ending in SUFFIXES[kind]} - {".md"}
    packed = [file for file in found if file not in known and suffix(file.stem) in endings]
    if packed:
        raise UserError(f"{packed[0]}: an unsupported compression format; decompress it, or remove it from the folder")
    files.sort(key=lambda file: file.relative_to(place).as_posix())
    files = _of_split(path, files, split)
    formats = {file: detect_format(file, str(file)) if wanted != "text" else "text" for file in files}
    if wanted:
        files = [file for file in files if formats[file] == wanted]
    if not files:
        what = wanted or "jsonl, json, csv, parquet or text"
        raise UserError(f"{path}: no {what} files with rows in this folder; check the path")
    for file in files:
        if formats[file] != formats[files[0]]:
            a, b = (f"{one.relative_to(place)} is {formats[one]}" for one in (files[0], file))
            remedy = "set `format` to one of them (in a --config file), or give the files one by one"
            raise UserError(f"{path}: mixed formats ({a}, {b}); {remedy}")
    names = tuple(file.relative_to(place).as_posix() for file in files)
    return Source(path, tuple(files), names, formats[files[0]], _sha256(files, names, True), folder=True)


def _of_split(path: str, files: list[Path], split: str) -> list[Path]:
    """The files of one split where all are named as the Hub's parquet files are, so that a dataset's folder gives the
    rows that its id does: else rows to test on would be trained on."""
    name = r".*/(?:(\w+)-\d{5}-of-\d{5}(?:-[0-9a-f]{16})?|default/(\w+)/\d{4})\.parquet"
    found = [re.fullmatch(name, file.absolute().as_posix(), re.DOTALL) for file in files]
    named = [match and (match[1] or match[2]) for match in found]
    splits = {each for each in named if each}
    if len(splits) < 2 or not all(named):
        return files
    if split not in splits:
        raise UserError(f"{path}: no split {split!r}; choose one of {', '.join(sorted(splits))} with --split")
    return [file for file, each in zip(files, named) if each == split]


def _open_dataset(path: str, split: str) -> Source:
    return Source(path, (), (path,), "hub", load_dataset(path, split)._fingerprint, split=split)


def _spool(stream: BinaryIO) -> Path:
    """A temporary copy of a stream that can be read only once; removed when the process ends."""
    handle, name = tempfile.mkstemp(prefix="gradshield-")
    atexit.register(lambda: Path(name).unlink(missing_ok=True))
    with open(handle, "wb") as copy:
        shutil.copyfileobj(stream, copy, 1 << 20)
    return Path(name)


def _sha256(files: Any, names: Any, folder: bool) -> str:
    digests = []
    for file in files:
        with open(file, "rb") as stream:
            digests.append(hashlib.file_digest(stream, "sha256").hexdigest())
    if not folder:
        return digests[0]
    listed = "".join(f"{digest}  {name}\n" for digest, name in zip(digests, names, strict=True))
    return hashlib.sha256(listed.encode("utf-8", "surrogateescape")).hexdigest()
