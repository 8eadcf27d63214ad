"""Bounds: no file, however small, takes much memory or time; what is over a limit is one line with its place."""

import json
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gradshield.data import open_source, read_rows

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured on Linux only")

MOST = 200  # MB above what the reading of one row takes
GOOD = b'{"prompt": "hi", "response": "yo"}'
MB = 1_000_000
LONG = b'{"a": "' + b"x" * 100_000 + b'"}'

# Reads and writes a file, every usable row kept. Prints what came of it, and the peak of memory in kB.
READ = """
import json, re, sys
from gradshield.data import open_source, read_rows, write_outputs
from gradshield.base.errors import UserError
try:
    source = open_source(sys.argv[1])
    problems = [row.problem for row in read_rows(source)]
    write_outputs(source, ["set aside" if problem else "kept" for problem in problems], {}, sys.argv[2])
    said = [problem for problem in problems if problem][:3]
except UserError as error:
    said = [str(error)]
print(json.dumps([said, int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])]))
"""


def read_apart(path):
    command = [sys.executable, "-c", READ, path, path.parent / "out"]
    said, peak = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return said, peak / 1000


def packed(*parts):
    """The parts as zstd, each (bytes, how often), made without ever being whole."""
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        for part, times in parts:
            many = max(1, MB // len(part))
            for _ in range(times // many):
                stream.write(part * many)
            stream.write(part * (times % many))
    return sink.getvalue().to_pybytes()


def table(path, arrays, **options):
    pq.write_table(pa.table(arrays), path, **options)


def same_texts(length, times):
    return pa.DictionaryArray.from_arrays(pa.array([0] * times, pa.int32()), ["x" * length])


BOMBS = {
    "line.jsonl": (
        lambda: packed((GOOD + b'\n{"a": "', 1), (b"x", 300 * MB)),
        ["line.jsonl:2: line over the limit of 64 MB"],
    ),
    "long.jsonl": (
        lambda: packed((b'{"a": "', 1), ("😀".encode(), 15 * MB), (b'"}\n' + GOOD, 1)),
        ["line of 60 MB, over the limit of 10 MB"],
    ),
    "blank.jsonl": (
        lambda: packed((GOOD + b"\n", 1), (b" ", 300 * MB)),
        ["blank.jsonl:2: line over the limit of 64 MB"],
    ),
    "lists.jsonl": (lambda: GOOD + b'\n{"a": [' + b"[]," * 3 * MB + b"0]}", ["more than 500,000 values"]),
    "keys.jsonl": (
        lambda: GOOD + b"\n{" + b",".join(b'"%d":0' % n for n in range(450_000)) + b"}",
        [],
    ),
    "line.txt": (lambda: packed((b"one\n", 1), (b"x", 300 * MB)), ["line.txt:2: line over the limit of 64 MB"]),
    "text.json": (
        lambda: packed((b'[\n{"a": "', 1), (b"x", 300 * MB)),
        ["text.json:2: element, or space beside it, over the limit of 10 MB"],
    ),
    "lists.json": (lambda: packed((b"[\n{},\n[", 1), (b"[],", 100 * MB)), ["lists.json:3: more than 500,000 values"]),
    "many.json": (lambda: packed((b"[", 1), (LONG + b",\n", 2500), (b"{}]", 1)), []),
    "around.json": (
        lambda: packed((b'{\n"a": "', 1), (b"x", 300 * MB)),
        ["around.json:1: element, or space beside it, over the limit of 10 MB"],
    ),
    "after.json": (
        lambda: packed((b'[{"a": "b"}]', 1), (b" ", 300 * MB)),
        ["after.json:1: element, or space beside it, over the limit of 10 MB"],
    ),
    "wrapped.json": (
        lambda: packed((b'{"data": [' + GOOD, 1), (b"," + LONG, 2500), (b"]}", 1)),
        [],
    ),
    "quote.csv": (
        lambda: packed((b'a,b\n1,"', 1), (b"x" * 999 + b"\n", 30_000)),
        ["record over the limit of 10 MB; is a quote not closed"],
    ),
    "line.csv": (lambda: packed((b"a,b\n1,", 1), (b"x", 300 * MB)), ["line.csv:2: line over the limit of 64 MB"]),
    "wide.csv": (lambda: packed((b"a,b\n1,", 1), (b"xx,", 20 * MB)), ["over the limit of 10 MB"]),
    "fields.csv": (lambda: packed((b"a,b\n1,", 1), (b"xx,", 3 * MB)), ["more than 500,000 fields"]),
    "header.csv": (lambda: packed((b"a,", 200 * MB)), ["header.csv:1: line over the limit of 64 MB"]),
    "columns.csv": (lambda: b",".join(b"%d" % n for n in range(200_000)) + b",7\n1,2\n", ["over the limit of 1 MB"]),
}


@pytest.fixture(scope="module")
def least(tmp_path_factory):
    """The memory that one row of each format takes."""
    place = tmp_path_factory.mktemp("least")
    (place / "a.jsonl").write_bytes(packed((GOOD, 1)))
    table(place / "a.parquet", {"a": ["b"]})
    return {name: read_apart(place / f"a.{name}")[1] for name in ("jsonl", "parquet")}


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_file_takes_little_memory(tmp_path, name, least):
    make, expected = BOMBS[name]
    data = make()
    (tmp_path / name).write_bytes(data)
    start = time.monotonic()
    said, peak = read_apart(tmp_path / name)
    print(f"{name}: {len(data)} bytes, {peak - least['jsonl']:.0f} MB, {time.monotonic() - start:.1f} s: {said}")
    assert peak - least["jsonl"] < MOST
    assert len(said[:1]) == len(expected) and all(part in line for part, line in zip(expected, said))


DELTA = {"use_dictionary": False, "column_encoding": "DELTA_BYTE_ARRAY", "compression": "zstd"}
PARQUET = {
    "texts": (lambda path: table(path, {"a": same_texts(5 * MB, 45)}), []),
    "rows": (lambda path: table(path, {"a": same_texts(12 * MB, 18)}), ["over the limit of 10 MB"]),
    "list": (
        lambda path: table(path, {"a": pa.ListArray.from_arrays([0, 1, MB], same_texts(5 * MB, MB))}),
        ["over the limit of 10 MB"],
    ),
    "page": (
        lambda path: table(path, {"a": ["x" * 100 * MB]}, use_dictionary=False, compression="zstd"),
        ["page.parquet: row group 1: column a: page over the limit of 64 MB"],
    ),
    "pages": (
        lambda path: table(
            path,
            {"a": ["x"] * 900 + ["x" * 9 * MB] * 40},
            use_dictionary=False,
            compression="zstd",
            write_batch_size=1,
        ),
        [],
    ),
    "prefixes": (lambda path: table(path, {"a": ["x" * 5 * MB] * 45}, **DELTA), []),
    "list of prefixes": (
        lambda path: table(path, {"a": [["x" * 5 * MB] * 60]}, **DELTA),
        ["column a.list.element: page, when unpacked, over the limit of 64 MB"],
    ),
    "many texts": (
        lambda path: table(path, {"a": [""] * 20 * MB}, max_rows_per_page=20 * MB, row_group_size=20 * MB, **DELTA),
        ["over 2,000,000 texts in a page of a"],
    ),
    "nulls": (
        lambda path: table(path, {"a": pa.ListArray.from_arrays([0, 50 * MB], pa.nulls(50 * MB, pa.int8()))}),
        ["over 32,000,000 values in a.list.element"],
    ),
}


# One bit of each byte of a footer flipped: the file is read, or refused in one line. pyarrow can abort here.
FOOTERS = """
import struct, sys
from pathlib import Path
from gradshield.data import open_source, read_rows
from gradshield.base.errors import UserError
path = Path(sys.argv[1])
whole = path.read_bytes()
for place in range(len(whole) - 8 - struct.unpack("<I", whole[-8:-4])[0], len(whole)):
    path.write_bytes(whole[:place] + bytes([whole[place] ^ int(sys.argv[2])]) + whole[place + 1 :])
    try:
        list(read_rows(open_source(path)))
    except UserError as error:
        assert "\\n" not in str(error)
"""


@pytest.mark.parametrize("bit", [1, 128])
def test_a_parquet_file_with_a_bit_of_its_footer_flipped_is_read_or_refused(tmp_path, bit):
    rows = [{"prompt": "a", "completion": "b", "n": 1}, {"prompt": None, "completion": "c", "n": None}]
    file = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows), file, store_schema=False)
    done = subprocess.run([sys.executable, "-c", FOOTERS, file, str(bit)], capture_output=True, text=True)
    assert not done.returncode, done.stderr


@pytest.mark.parametrize("name", PARQUET)
def test_a_small_parquet_file_takes_little_memory(tmp_path, name, least):
    make, expected = PARQUET[name]
    path = tmp_path / f"{name}.parquet"
    make(path)
    start = time.monotonic()
    said, peak = read_apart(path)
    size = path.stat().st_size
    print(f"{name}: {size} bytes, {peak - least['parquet']:.0f} MB, {time.monotonic() - start:.1f} s: {said}")
    assert peak - least["parquet"] < MOST
    assert len(said[:1]) == len(expected) and all(part in line for part, line in zip(expected, said))


@pytest.mark.parametrize("codec", ["zstd", "lz4"])
@pytest.mark.parametrize("kind", ["text", "dictionary", "split"])
def test_a_datasets_folder_with_compressed_files_is_refused_unread(tmp_path, codec, kind):
    folder = tmp_path / "saved"
    data = datasets.Dataset.from_dict({"prompt": ["a"], "completion": ["b"]})
    (datasets.DatasetDict({"train": data, "test": data}) if kind == "split" else data).save_to_disk(folder)
    file = sorted(folder.rglob("*.arrow"))[0]
    assert [row.record for row in read_rows(open_source(folder))] == [{"prompt": "a", "completion": "b"}]
    columns = {"prompt": ["a"], "completion": ["b" * 300 * MB]}
    if kind == "dictionary":
        columns["completion"] = pa.array(columns["completion"]).dictionary_encode()
    bomb = pa.table(columns)
    with pa.ipc.new_stream(file, bomb.schema, options=pa.ipc.IpcWriteOptions(compression=codec)) as stream:
        stream.write_table(pa.table({"prompt": ["a"], "completion": bomb["completion"].slice(0, 1)}))
    assert file.stat().st_size < 2 * MB
    said, peak = read_apart(folder)
    assert len(said) == 1 and said[0].startswith(f"{file}: compressed") and peak < 300, (said, peak)


def test_a_key_that_is_there_twice_among_many_is_found_in_linear_time(tmp_path):
    keys = [f'"{n}": 0' for n in range(400_000)]
    nested = ",".join(f'"{n}": {{"x": 0, "x": 1}}' for n in range(100_000))
    (tmp_path / "a.jsonl").write_text("{" + ", ".join(keys) + ', "399999": 1}\n' + "{" + nested + "}\n")
    start = time.monotonic()
    one, two = read_rows(open_source(tmp_path / "a.jsonl", format="jsonl"))
    assert "key '399999' appears twice" in one.problem and "key 'x' appears twice" in two.problem
    assert time.monotonic() - start < 10
