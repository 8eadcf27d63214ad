"""Small files that would be huge in memory: refused in one line or set aside, in bounded memory and time."""

import gzip
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from gradshield.base.errors import UserError
from gradshield.data import open_source, read_rows
from torture.process import apart

SECONDS, MEMORY = 300, 2 << 30  # what a bomb may take
BLOCK = 64 << 20  # bytes of one compressed member; members follow one another
ROW = b'{"prompt": "Hello", "completion": "%s"}\n'


def campaign(work: Path, short: bool) -> Counter[str]:
    """Reads every bomb; the counter has "bounded", and "failed: ..." for what must not be."""
    found: Counter[str] = Counter()
    for name, make in bombs(16 if short else 128):
        file = work / name
        file.write_bytes(make())
        ended = apart(lambda file=file: _read(file), work, SECONDS)
        if ended.code or not ended.clean:
            found[f"failed: {name}: exit {ended.code} {ended.said[-200:]!r}"] += 1
        elif ended.peak > MEMORY:
            found[f"failed: {name}: {ended.peak >> 20} MB of memory for {file.stat().st_size >> 10} kB"] += 1
        else:
            found["bounded"] += 1
        file.unlink()
    return found


def _read(file: Path) -> str:
    try:
        rows = sum(1 for _ in read_rows(open_source(file)))
        return f"{rows} rows"
    except UserError as error:
        return str(error)


def bombs(members: int) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """(file name, its bytes); a packed one unpacks to `members` times 64 MB."""
    long = ROW.replace(b"%s", b"a" * (BLOCK // 2))

    def packed(codec: str, block: bytes, around: tuple[bytes, bytes] = (b"", b"")) -> bytes:
        def pack(data: bytes) -> bytes:
            if codec == "gz":
                return gzip.compress(data, 6, mtime=0)
            return pa.compress(data, "zstd", asbytes=True)

        return pack(around[0]) + pack(block) * members + pack(around[1])

    for codec in ("gz", "zst"):
        yield f"one-line.jsonl.{codec}", lambda c=codec: packed(c, b"a" * BLOCK, (b'{"prompt": "', b'"}\n'))
        yield f"blank.jsonl.{codec}", lambda c=codec: packed(c, b" " * BLOCK, (b"", ROW))
        yield f"array.json.{codec}", lambda c=codec: packed(c, b" " * BLOCK, (b"[", b"]"))
        yield f"one-field.csv.{codec}", lambda c=codec: packed(c, b"a" * BLOCK, (b'prompt,completion\n"', b'",b\n'))
        yield f"plain.txt.{codec}", lambda c=codec: packed(c, b"a" * BLOCK)
        yield f"long-rows.jsonl.{codec}", lambda c=codec: packed(c, long)
    yield "fields.csv", lambda: b"prompt,completion\n" + b"," * (members << 20) + b"\n"
    yield "keys.jsonl", lambda: b"{" + b", ".join([b'"prompt": "a"'] * (members << 12)) + b"}\n"
    yield "deep.jsonl", lambda: b'{"prompt": ' + b"[" * (members << 16) + b"]" * (members << 16) + b"}\n" + ROW
    yield "deep.json", lambda: b"[" * (members << 16) + b"]" * (members << 16)
    yield "digits.jsonl", lambda: b'{"prompt": ' + b"9" * (members << 16) + b', "completion": "b"}\n' + ROW
    yield "dictionary.parquet", lambda: _dictionary(members)
    yield "page.parquet", lambda: _page(members)
    yield "many.jsonl", lambda: json.dumps({"messages": [{"role": "user", "content": "a"}] * (members << 12)}).encode()


def _dictionary(members: int) -> bytes:
    """A text of 1 MB, once in the file and in every row."""
    column = pa.DictionaryArray.from_arrays(pa.array([0] * members * 64, pa.int32()), ["a" * (1 << 20)])
    return _parquet(pa.table({"prompt": column, "completion": column}))


def _page(members: int) -> bytes:
    """Texts of 1 MB in one row group, which packs them to nothing."""
    column = pa.array(["a" * (1 << 20)] * members * 4)
    return _parquet(pa.table({"prompt": column, "completion": column}))


def _parquet(table: pa.Table) -> bytes:
    stream = io.BytesIO()
    pq.write_table(table, stream, compression="zstd")
    return stream.getvalue()
