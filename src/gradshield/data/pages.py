"""Parquet in pieces of bounded memory. What a page would unpack to is checked before it is unpacked.

A column chunk can say "this text of 10 MB, a million times" in a few bytes. So texts stay in their dictionaries
until it is known how much they come to.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import BytesIO, FileIO
from pathlib import PurePath
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from gradshield.base.errors import UserError
from gradshield.data.delta import LENGTHS, PREFIXES, text_sizes, varint, zigzag
from gradshield.data.limits import MAX_LINE, too_large

MAX_PAGE = 64_000_000  # bytes of one page, unpacked
MAX_VALUES = 32_000_000  # of a row group's column of lists: a list of any length takes no space if all in it is equal
BATCH_BYTES = 8_000_000  # bytes that a batch should come to, as Python values

_ROWS = 1000  # of a batch at most
_DATA_PAGES = {5: 2, 8: 4}  # field of a page's header that describes its data: the field of that with the encoding
_DICTIONARY = (2, 8)  # encodings of a data page whose values are places in the dictionary page
_RLE = 3  # encoding of levels
_MAX_TEXTS = 2_000_000  # of a page with a delta encoding, as pyarrow holds all lengths in it at once
_HEADER = 1 << 16  # bytes of a page's header at most, with the statistics in it


class _FooterRead(Exception):
    """Raised when anything but the footer is read."""


class _Stream(FileIO):
    """A file that can be told to give no more."""

    ended = False

    def read(self, size: int | None = -1) -> bytes:
        if self.ended:
            raise _FooterRead
        return super().read(size)


@contextmanager
def open_parquet(path: PurePath) -> Iterator[Any]:
    """The ParquetFile, opened so that it reads no more ahead than a page. Raises OSError where its footer is broken."""
    with _Stream(os.fspath(path)) as stream, _reader(stream) as file:
        stream.ended = True
        for group in range(file.num_row_groups):
            # Looking at a broken column chunk in `file.metadata` would abort the process; a reader raises.
            with suppress(_FooterRead):
                next(file.iter_batches(batch_size=1, row_groups=[group]), None)
        stream.ended = False
        yield file


def _reader(stream: FileIO, **options: Any) -> Any:
    """The ParquetFile of an open file, since pyarrow takes no name that is not UTF-8."""
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(stream, pre_buffer=False, buffer_size=1 << 16, **options)


def parquet_batches(path: PurePath, name: str) -> Iterator[tuple[int, Any]]:
    """(row group, record batch) in order, with texts in dictionaries; `light_batches` undoes that.

    Texts in a delta encoding have no dictionaries; what they come to is known from their lengths.
    Raises UserError, before it is in memory, at a page over `MAX_PAGE` and a list column over `MAX_VALUES`.
    """
    with open(path, "rb") as stream, open_parquet(path) as file, ExitStack() as opened:
        leaves = {file.schema.column(n).path for n in range(len(file.schema))}
        reader, kept = None, set()
        for group in range(file.num_row_groups):
            rows, delta = _rows_at_once(stream, file, group, name)
            if reader is None or kept != leaves - delta:  # pyarrow can't make dictionaries of a delta encoding
                opened.close()
                kept = leaves - delta
                again = opened.enter_context(FileIO(os.fspath(path)))
                reader = opened.enter_context(_reader(again, read_dictionary=list(kept), metadata=file.metadata))
            for batch in reader.iter_batches(batch_size=rows, row_groups=[group]):
                yield group, batch


def light_batches(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches with texts as texts, split so that each comes to `BATCH_BYTES` bytes or is one row.

    One row of more than `MAX_LINE` keeps its dictionaries, as it would come to any size without them.
    """
    for batch in batches:
        heavy = weight(batch)
        if heavy > BATCH_BYTES and len(batch) > 1:
            half = len(batch) // 2
            # Taken, not sliced: a slice's lists are cast together with all that lies beside them.
            yield from light_batches(take_rows(batch, rows) for rows in np.split(np.arange(len(batch)), [half]))
        else:
            yield batch if heavy > MAX_LINE else without_dictionaries(batch)


def take_rows(batch: Any, rows: np.ndarray) -> Any:
    """The rows of the batch, also where `take` does not know a column's type: then by runs of neighbours."""
    import pyarrow

    try:
        return batch.take(rows)
    except pyarrow.ArrowNotImplementedError:
        runs = np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1)
        return pyarrow.concat_batches([batch.slice(run[0], len(run)) for run in runs])


def without_dictionaries(batch: Any) -> Any:
    """The batch with texts in place of their dictionaries."""
    import pyarrow as pa

    return batch.cast(pa.schema([field.with_type(_plain_type(field.type)) for field in batch.schema]))


def _plain_type(kind: Any) -> Any:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        return kind.value_type
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_plain_type(field.type)) for field in kind])
    if pa.types.is_map(kind):
        return pa.map_(_plain_type(kind.key_type), _plain_type(kind.item_type))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        item = kind.value_field.with_type(_plain_type(kind.value_type))
        if pa.types.is_fixed_size_list(kind):
            return pa.list_(item, kind.list_size)
        return pa.large_list(item) if pa.types.is_large_list(kind) else pa.list_(item)
    return kind


def weight(batch: Any) -> int:
    """Approximate size of the batch in bytes without dictionaries."""
    return sum(map(_weight, batch.columns))


def _weight(array: Any) -> int:
    import pyarrow as pa
    import pyarrow.compute as pc

    if isinstance(array, pa.ExtensionArray):
        return _weight(array.storage)
    if isinstance(array, pa.StructArray):
        return 8 * len(array) + sum(map(_weight, array.flatten()))
    if isinstance(array, pa.MapArray):  # which has no `flatten`; a slice's keys are those of the whole
        pairs = pa.StructArray.from_arrays([array.keys, array.items], ["key", "value"])
        return _weight(pa.ListArray.from_arrays(array.offsets, pairs))
    if hasattr(array, "flatten"):  # lists of all kinds
        return 8 * len(array) + _weight(array.flatten())
    if isinstance(array, pa.DictionaryArray) and _is_text(array.type.value_type):
        sizes = pc.binary_length(array.dictionary).take(array.indices)  # type: ignore[attr-defined]
        return 8 * len(array) + (pc.sum(sizes).as_py() or 0)  # type: ignore[attr-defined]
    return array.nbytes


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    return types.is_string(kind) or types.is_large_string(kind) or types.is_binary(kind) or types.is_large_binary(kind)


def _rows_at_once(stream: BinaryIO, file: Any, group: int, name: str) -> tuple[int, set[str]]:
    """(how many rows of the group come to `BATCH_BYTES` bytes at most, columns with a delta encoding), by its pages."""
    metadata = file.metadata.row_group(group)
    place, per_row, delta = f"{name}: row group {group + 1}", 1.0, set()
    if not metadata.num_rows:  # which has no pages, as writers end an empty part
        return 1, delta
    for number in range(metadata.num_columns):
        chunk, column = metadata.column(number), file.schema.column(number)
        if column.length > MAX_LINE:
            raise too_large(place, f"column {column.path}: values", MAX_LINE)
        pages = _measured_pages(stream, chunk, column, place)
        if pages.texts:
            delta.add(column.path)
        values_per_row = max(1.0, pages.values / max(1, metadata.num_rows))
        per_row += max(_bytes_per_value(pages, column, place), column.length) * values_per_row
    return max(1, min(_ROWS, int(BATCH_BYTES / per_row))), delta


class _Measured(NamedTuple):
    """The pages of a column chunk, measured."""

    values: int
    bytes_per_value: float  # of the densest page
    dictionary: int  # bytes of it
    indices: int  # most values of a page of indices into it
    texts: list[tuple[int, int, int]]  # (values, longest text, all texts) of each page in a delta encoding


def _measured_pages(stream: BinaryIO, chunk: Any, column: Any, place: str) -> _Measured:
    """Raises UserError for a page that is too large."""
    found = _Measured(0, 1.0, 0, 0, [])
    for page in _pages(stream, chunk, place):
        if max(page.size, page.packed) > MAX_PAGE:
            raise too_large(place, f"column {column.path}: page", MAX_PAGE)
        values, densest, dictionary, indices, texts = found
        if not page.values:
            dictionary = max(dictionary, page.size)
            densest = max(densest, page.size * (column.logical_type.type == "JSON"))
        elif page.encoding in (LENGTHS, PREFIXES):
            texts.append((page.values, *_text_sizes(stream, page, chunk, column, place)))
        else:
            densest = max(densest, page.size / page.values)
            indices = max(indices, page.values * (page.encoding in _DICTIONARY))
        found = _Measured(values + page.values, densest, dictionary, indices, texts)
    return found


def _bytes_per_value(pages: _Measured, column: Any, place: str) -> float:
    """The bytes per value of the densest page. Raises UserError if one row may hold more bytes than a page may, or too
    many values."""
    densest, texts = pages.bytes_per_value, list(pages.texts)
    if texts and pages.indices:  # its writer stopped using the dictionary, so each text may be as long as all of it
        texts.append((pages.indices, pages.dictionary, pages.dictionary * pages.indices))
    for values, longest, size in texts:
        if size > MAX_PAGE and column.max_repetition_level:  # they may all be in one row
            if pages.indices:
                raise UserError(
                    f"{place}: column {column.path} begins with dictionary encoding and ends with another; "
                    "write the whole column with one encoding, plain or dictionary"
                )
            raise too_large(place, f"column {column.path}: page, when unpacked,", MAX_PAGE)
        densest = max(densest, longest if size > MAX_PAGE else size / values)
    if pages.values > MAX_VALUES and column.max_repetition_level:
        raise UserError(f"{place}: over {MAX_VALUES:,} values in {column.path}; write smaller row groups")
    return densest


class _Page(NamedTuple):
    size: int  # bytes when unpacked
    values: int  # 0 of a dictionary page
    encoding: int
    start: int  # of its data in the file
    packed: int  # bytes in the file
    header: dict[int, Any]  # of its kind
    version: int  # of a data page: 1 or 2


def _pages(stream: BinaryIO, chunk: Any, place: str) -> Iterator[_Page]:
    """Each page of a column chunk, by its header."""
    first = chunk.data_page_offset
    if chunk.has_dictionary_page and 0 < chunk.dictionary_page_offset < first:
        first = chunk.dictionary_page_offset
    at, end = first, first + chunk.total_compressed_size
    while at < end:
        stream.seek(at)
        header = BytesIO(stream.read(_HEADER))
        try:
            fields = _struct(header)
            size, packed = fields[2], fields[3]
            kind = next((kind for kind in _DATA_PAGES if kind in fields), None)
            values, encoding = (fields[kind][1], fields[kind][_DATA_PAGES[kind]]) if kind else (0, 0)
            if min(size, packed, values) < 0:
                raise ValueError
        except (KeyError, IndexError, TypeError, ValueError, RecursionError):
            raise UserError(f"{place}: a broken page header at byte {at}; write the file again") from None
        at += header.tell()
        yield _Page(size, values, encoding, at, packed, fields[kind] if kind else {}, 2 if kind == 8 else 1)
        at += packed


def _text_sizes(stream: BinaryIO, page: _Page, chunk: Any, column: Any, place: str) -> tuple[int, int]:
    """(bytes of the longest text, bytes of all) of a page with a delta encoding."""
    if page.values > _MAX_TEXTS:
        raise UserError(f"{place}: over {_MAX_TEXTS:,} texts in a page of {column.path}; write smaller pages")
    stream.seek(page.start)
    data, header = stream.read(page.packed), page.header
    try:
        if page.version == 2:  # whose levels are not packed
            levels = header[5] + header[6]
            if not 0 <= levels <= min(page.size, page.packed):
                raise ValueError
            data = data[levels:]
            values = BytesIO(_unpacked(data, page.size - levels, chunk) if header.get(7, True) else data)
        else:
            values = BytesIO(_unpacked(data, page.size, chunk))
            for most, encoding in ((column.max_repetition_level, 4), (column.max_definition_level, 3)):
                if most:
                    if header[encoding] != _RLE:
                        raise ValueError
                    values.seek(int.from_bytes(values.read(4), "little"), os.SEEK_CUR)
        return text_sizes(values, page.encoding, page.values)
    except (KeyError, IndexError, TypeError, ValueError, OSError):
        raise UserError(f"{place}: {column.path}: a broken page at byte {page.start}; write the file again") from None


def _unpacked(data: bytes, size: int, chunk: Any) -> bytes:
    import pyarrow

    if chunk.compression == "UNCOMPRESSED" or not size:
        return data
    codec = {"LZ4": "lz4_raw"}.get(chunk.compression, chunk.compression.lower())
    return pyarrow.Codec(codec).decompress(data, size, asbytes=True)


def _struct(data: BytesIO) -> dict[int, Any]:
    """A struct in Thrift's compact protocol, by field number."""
    fields: dict[int, Any] = {}
    number = 0
    while (head := data.read(1)[0]) != 0:
        number = number + (head >> 4) if head >> 4 else zigzag(data)
        fields[number] = _thrift_value(data, head & 15)
    return fields


def _thrift_value(data: BytesIO, kind: int) -> Any:
    if kind in (1, 2):  # true, false
        return kind == 1
    if kind == 3:
        return data.read(1)[0]
    if kind in (4, 5, 6):
        return zigzag(data)
    if kind == 7:
        return data.read(8)
    if kind == 8:
        return data.read(varint(data))
    if kind == 12:
        return _struct(data)
    raise ValueError(f"no page header holds a field of type {kind}")
