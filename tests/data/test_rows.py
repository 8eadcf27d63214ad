"""Reading: every row in its own bytes and at its own line, and no bad row ever stops the reading."""

import bz2
import codecs
import gzip
import io
import json
import lzma
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data.read import GOOD, one_line, rows_of
from hypothesis import given
from hypothesis import strategies as st

from gradshield.base.errors import UserError
from gradshield.data import open_source, read_rows, write_outputs
from gradshield.data import records as records_module


def test_import_needs_no_torch():
    code = "import sys, gradshield.data; print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_jsonl_is_cut_at_newline_bytes_only(tmp_path):
    lines = ['{"text": "a\u2028b\u0085c"}\r\n'.encode(), b"\n", b" \r\n", b'{"text": "d"}']
    (tmp_path / "a.jsonl").write_bytes(codecs.BOM_UTF8 + b"".join(lines))
    first, last = rows_of(tmp_path / "a.jsonl")
    assert first.record == {"text": "a\u2028b\u0085c"} and first.raw == codecs.BOM_UTF8 + lines[0]
    assert (last.index, last.line, last.raw, last.source) == (1, 4, lines[3], "a.jsonl")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"a": "b', "not valid JSON at column 7"),
        (b'{"a": 1} {"b": 2}', "not valid JSON at column 10"),
        (b'{"a": "\xff"}', "invalid UTF-8 at byte offset 7"),
        (b'{"a": "\xed\xa0\x80"}', "invalid UTF-8 at byte offset 7"),
        (b"[1, 2]", "not a JSON object but a list"),
        (b'"text"', "not a JSON object but a str"),
        (rb'{"a": ["x", {"b": "\ud800"}]}', r"lone surrogate \ud800"),
        (rb'{"a": "\uD83D"}', r"lone surrogate \ud83d"),
        (rb'{"\ud800": "a"}', r"lone surrogate \ud800"),
        (b'{"a": "x\0y"}', "NUL character at byte offset 8"),
        (rb'{"a": "x\u0000y"}', "NUL character in a text"),
        (b'{"a": 1, "b": 2, "a": 3}', "key 'a' appears twice"),
        (b'{"m": [{"role": "user", "role": "x"}]}', "key 'role' appears twice"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not usable JSON"),
    ],
)
def test_a_bad_line_is_a_row_with_a_problem(tmp_path, line, problem):
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([GOOD, line, GOOD]))
    before, bad, after = rows_of(tmp_path / "a.jsonl")
    assert problem in bad.problem and bad.record is None and bad.raw == line + b"\n" and bad.line == 2
    assert before.record == after.record == json.loads(GOOD) and before.problem is after.problem is None


def test_pairs_of_surrogates_and_escaped_backslashes_are_good_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(rb'{"a": "\ud83d\ude00", "b": "C:\\u0000"}')
    (row,) = rows_of(tmp_path / "a.jsonl")
    assert row.record == {"a": "😀", "b": r"C:\u0000"}


def test_an_overlong_line_is_not_parsed(tmp_path, monkeypatch):
    monkeypatch.setattr(records_module, "MAX_RECORD", 2_000_000)
    long = b'{"text": "' + b"x" * 3_000_000 + b'"}\n'
    (tmp_path / "a.jsonl").write_bytes(GOOD + b"\n" + long + GOOD)
    _, bad, after = rows_of(tmp_path / "a.jsonl")
    assert bad.problem == "line of 3 MB, over the limit of 2 MB" and bad.raw == long and after.record


@given(st.lists(st.binary(max_size=30).map(lambda b: b.replace(b"\n", b"")), max_size=12), st.booleans())
def test_any_bytes_are_read_and_nothing_but_blank_lines_is_lost(tmp_path_factory, lines, ended):
    path = tmp_path_factory.mktemp("any") / "a.jsonl"
    data = b"\n".join([GOOD, *lines]) + (b"\n" if ended else b"")
    path.write_bytes(data)
    rows = rows_of(path, format="jsonl")
    *whole, last = data.split(b"\n")
    assert [row.raw for row in rows] == [line for line in (*(part + b"\n" for part in whole), last) if line.strip()]
    assert all((row.record is None) != (row.problem is None) for row in rows)
    assert [row.index for row in rows] == list(range(len(rows)))


@pytest.mark.parametrize(
    ("name", "data", "format"),
    [
        ("a.jsonl", b'[{"a": "b"}]', "json"),
        ("a.jsonl", codecs.BOM_UTF8 + b' \n[\n{"a": "b"}]', "json"),
        ("a.json", b'{"a": "b"}\n{"a": "c"}', "jsonl"),
        ("a.json", b'{"a": "b"}', "jsonl"),
        ("a.json", b'{"data": [{"a": "b"}]}', "json"),
        ("a.json", b'{\n "version": 1,\n "data": [\n  {"a": "b"}\n ]\n}\n', "json"),
        ("a.json", b'{"data": [\n{"a": "b"},\n{"a": "c"}\n]}\n', "json"),
        ("a.json", b'{"data": [\n{"a": "b"}\n]\n}\n', "json"),
        ("a.jsonl", b'{"a": "b",\n{"a": "c"}\n', "jsonl"),
        ("a.jsonl", b'{"instruction": "a", "output": "b", "examples": [{"a": "b"}]}\n', "jsonl"),
        ("a.json", b'{"messages": [{"role": "user", "content": "b"}]}', "jsonl"),
        ("a.json", b'{"messages": [{"role": "user", "content": "b"}], "functions": [{"name": "f"}]}', "jsonl"),
        ("a.jsonl", b'{"a": \n{"a": "b"}\n', "jsonl"),
        ("a.jsonl", b'garbage\n{"a": "b"}\n', "jsonl"),
        ("a.csv", b"a,b\n1,2\n", "csv"),
        ("a.tsv", b"a\tb,c\n1\t2\n", "csv"),
        ("a.data", b"a;b\n1;2\n", "csv"),
        ("a.txt", b"Once, upon\n[a time]", "text"),
        ("a.txt", b'{"a": "b"}\n', "jsonl"),
        ("a.md", b"# Title", "text"),
        ("a.jsonl", gzip.compress(b'{"a": "b"}\n', mtime=0), "jsonl"),
        ("a.jsonl.zst", pa.compress(b'{"a": "b"}\n', codec="zstd", asbytes=True), "jsonl"),
        (  # pzstd and other writers put a skippable frame in front
            "b.jsonl.zst",
            b"\x50\x2a\x4d\x18\x04\x00\x00\x00meta" + pa.compress(b'{"a": "b"}\n', codec="zstd", asbytes=True),
            "jsonl",
        ),
    ],
)
def test_format_is_told_by_content(tmp_path, name, data, format):
    (tmp_path / name).write_bytes(data)
    source = open_source(tmp_path / name)
    assert source.format == format
    assert any(row.record for row in read_rows(source))


def test_format_option_overrides_the_content(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"a,b\n1,2\n")
    assert [row.record for row in rows_of(tmp_path / "a.csv", format="text")] == [{"text": "a,b"}, {"text": "1,2"}]


def test_json_array_elements_keep_their_bytes_and_lines(tmp_path):
    elements = ['{"a": "ü\\u00fc",\n  "b" : 1.50}'.encode(), b"17", b'{"a": "\xff"}', b'{"n": ' + b"1" * 5000 + b"}"]
    (tmp_path / "a.json").write_bytes(codecs.BOM_UTF8 + b"[\n" + b" ,\n\n".join(elements) + b"\n]\n")
    rows = rows_of(tmp_path / "a.json")
    assert [row.raw for row in rows] == elements
    assert [row.line for row in rows] == [2, 5, 7, 9]
    assert rows[0].record == {"a": "üü", "b": 1.5} and not any(row.record for row in rows[1:])


@given(
    st.lists(st.dictionaries(st.text(max_size=3), st.text() | st.floats() | st.none(), max_size=3), max_size=5),
    st.sampled_from([None, 0, 2]),
    st.booleans(),
    st.booleans(),
)
def test_json_arrays_of_any_dress_give_their_elements(tmp_path_factory, values, indent, ascii, wrapped):
    path = tmp_path_factory.mktemp("json") / "a.json"
    whole = {"n": {"data": [1]}, "rows": values} if wrapped and values else values
    text = json.dumps(whole, indent=indent, ensure_ascii=ascii)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    rows = rows_of(path, format="json")
    assert len(rows) == len(values) and text.encode("utf-8", "surrogatepass").count(b"".join(r.raw for r in rows[:1]))
    for row, value in zip(rows, values, strict=True):
        assert row.problem or json.dumps(row.record) == json.dumps(value)


@pytest.mark.parametrize(
    ("data", "where"),
    [
        (b'[{"a": 1},\n {"a": }]', "line 2, column 8"),
        (b'[{"a": 1}\n {"a": 2}]', "line 2, column 2"),
        (b'[{"a": 1},\n', "line 2, column 1"),
        (b'[{"a": 1},]', "line 1, column 11"),
        (b'[{"a": 1}]\n[]', "line 2, column 1"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{\n"a": [{"b": 1}],\n"c": [{"b": 1}]\n}', "several keys (a, c)"),
        (b'{\n"prompt": ["a"],\n"response": ["b"]\n}', "no list of rows"),
        (b'{\n"messages": [{"role": "user"}]\n}', "no list of rows"),
        (b'{"data": [{"prompt": "x"}], "data": [{"prompt": "y"}]}', "'data' appears twice"),
        (b'{\n"prompt": ["x"],\n"data": [{"prompt": "y"}]\n}', "'prompt' next to a list of rows"),
        (b'{"ids": [1],\n"data": [{"prompt": "y"}]\n}', "'ids' next to a list of rows"),
    ],
)
def test_a_broken_array_is_reported_with_its_place(tmp_path, data, where):
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(UserError) as excinfo:
        rows_of(tmp_path / "a.json")
    assert where in one_line(excinfo) and "a.json" in str(excinfo.value)


def test_csv_records_keep_their_bytes_and_physical_lines(tmp_path):
    records = [b'"a ""b""\r\nc",d\r\n', b"\r\n", "é,\u2028\n".encode(), b"x\0,y\n", b"1\n", b"\xff,2\n", b'"open,1\n2']
    (tmp_path / "a.csv").write_bytes(codecs.BOM_UTF8 + b"prompt,response\r\n" + b"".join(records))
    rows = rows_of(tmp_path / "a.csv")
    assert [row.raw for row in rows] == [record for record in records if record.strip()]
    assert [row.line for row in rows] == [2, 5, 6, 7, 8, 9]
    assert rows[0].record == {"prompt": 'a "b"\r\nc', "response": "d"}
    assert rows[1].record == {"prompt": "é", "response": "\u2028"}
    problems = ["NUL character", "1 fields where the header has 2", "invalid UTF-8", "unexpected end of data"]
    assert all(problem in row.problem for row, problem in zip(rows[2:], problems, strict=True))


def test_a_csv_header_with_a_column_twice_is_refused(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"a,a\n1,2\n")
    with pytest.raises(UserError, match="column 'a' appears twice"):
        rows_of(tmp_path / "a.csv")


def test_parquet_gives_python_values(tmp_path):
    turns = [[{"role": "user", "content": "hi", "weight": None}], []]
    label = pa.array(["x", "y"]).dictionary_encode()
    pq.write_table(pa.table({"messages": turns, "label": label}), tmp_path / "a.dat")
    rows = rows_of(tmp_path / "a.dat")
    assert [row.record for row in rows] == [{"messages": t, "label": x} for t, x in zip(turns, "xy", strict=True)]
    assert [(row.line, json.loads(row.raw)) for row in rows] == [(n + 1, row.record) for n, row in enumerate(rows)]


def test_parquet_text_that_is_not_utf8_is_a_row_with_a_problem(tmp_path):
    bad = pa.array([b"a", b"\xff", b"c\0"]).view(pa.string())
    pq.write_table(pa.table({"text": bad}), tmp_path / "a.parquet")
    good, broken, nul = rows_of(tmp_path / "a.parquet")
    assert good.record == {"text": "a"} and "invalid UTF-8" in broken.problem and "NUL" in nul.problem
    assert pa.ipc.open_stream(broken.raw).read_all().column(0).cast(pa.binary()).to_pylist() == [b"\xff"]


def as_json(*texts):
    """A column as `datasets` stores what differs from row to row."""
    return pa.ExtensionArray.from_storage(pa.json_(), pa.array(texts, pa.string()))


def test_parquet_fields_of_json_are_what_they_say(tmp_path):
    texts = as_json('"a"', '[{"role": "user"}]', "3", None)
    columns = {
        "whole": texts,
        "list": pa.ListArray.from_arrays([0, 2, 2, 3, 4], texts),
        "large": pa.LargeListArray.from_arrays([0, 2, 2, 3, 4], texts),
        "fixed": pa.FixedSizeListArray.from_arrays(texts, 1),
        "struct": pa.StructArray.from_arrays([pa.array(["1"] * 4), texts], names=["text", "json"]),
        "text": pa.array(["1"] * 4),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    rows = rows_of(tmp_path / "a.parquet")
    values = ["a", [{"role": "user"}], 3, None]
    assert [row.record["whole"] for row in rows] == values
    assert [row.record["list"] for row in rows] == [values[:2], [], [3], [None]] == [r.record["large"] for r in rows]
    assert [row.record["fixed"] for row in rows] == [[value] for value in values]
    assert [row.record["struct"] for row in rows] == [{"text": "1", "json": value} for value in values]
    assert all(row.record["text"] == "1" and json.loads(row.raw) == row.record for row in rows)


@pytest.mark.parametrize("text", ['{"a"', "[" * 100_000, "9" * 5000, r'"\ud800"', r'"\u0000"'])
def test_bad_json_in_parquet_is_a_row_with_a_problem(tmp_path, text):
    pq.write_table(pa.table({"text": as_json('"a"', text, '"b"')}), tmp_path / "a.parquet")
    before, bad, after = rows_of(tmp_path / "a.parquet")
    assert (before.record, after.record) == ({"text": "a"}, {"text": "b"})
    assert bad.record is None and any(word in bad.problem for word in ("not usable JSON", "surrogate", "NUL"))


def test_a_row_is_nested_a_hundred_levels_deep_at_most(tmp_path):
    lines = [
        b'{"a": ' + b'{"b": ' * (n // 2) + b"[" * (n - n // 2) + b"]" * (n - n // 2) + b"}" * (n // 2) + b"}\n"
        for n in range(97, 103)
    ]
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines))
    rows = rows_of(tmp_path / "a.jsonl")
    assert [row.problem for row in rows] == [None] * 3 + ["JSON nested too deeply"] * 3
    assert [row.raw for row in rows] == lines
    wide = {"a": [[n] for n in range(500)], "b": "[" * 500}
    (tmp_path / "b.jsonl").write_text(json.dumps(wide))
    assert rows_of(tmp_path / "b.jsonl")[0].record == wide


def test_json_of_any_depth_in_parquet_is_read_or_a_problem(tmp_path):
    texts = ["[" * depth + "]" * depth for depth in range(900, 1010)]  # about Python's limit
    pq.write_table(pa.table({"text": as_json(*texts)}), tmp_path / "a.parquet")
    rows = rows_of(tmp_path / "a.parquet")
    assert len(rows) == len(texts) and all((row.record is None) != (row.problem is None) for row in rows)


@pytest.mark.parametrize(
    "column",
    [
        pa.array([0, 10**7, 0], pa.date32()),
        pa.array([0, 253402300800 * 10**6, 0], pa.timestamp("us")),
        pa.array([None, 0, None], pa.timestamp("us", "Mars/Olympus")),
        pa.StructArray.from_arrays([pa.array([1] * 3)] * 2, names=["x", "x"], mask=pa.array([True, False, True])),
    ],
)
def test_parquet_values_that_python_can_not_hold_are_rows_with_a_problem(tmp_path, column):
    pq.write_table(pa.table({"text": ["a", "b", "c"], "other": column}), tmp_path / "a.parquet")
    rows = rows_of(tmp_path / "a.parquet")
    assert len(rows) == 3 and "can't be read" in rows[1].problem
    assert pa.ipc.open_stream(rows[1].raw).read_all().column("text").to_pylist() == ["b"]


def test_parquet_maps_are_lists_of_pairs(tmp_path):
    pairs = [[("k", "v"), ("l", "w")], [], None]
    table = pa.table({"text": ["a", "b", "c"], "map": pa.array(pairs, pa.map_(pa.string(), pa.string()))})
    pq.write_table(table, tmp_path / "a.parquet")
    assert [row.record["map"] for row in rows_of(tmp_path / "a.parquet")] == pairs


@pytest.mark.parametrize("empty", [pa.table({"text": pa.array([], pa.string())}), pa.table({})])
def test_an_empty_part_of_a_folder_of_parquet_files_holds_no_rows(tmp_path, empty):
    (tmp_path / "in").mkdir()
    pq.write_table(empty, tmp_path / "in" / "a.parquet")
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "in" / "b.parquet")
    assert [row.record for row in rows_of(tmp_path / "in")] == [{"text": "a"}]
    assert write_outputs(open_source(tmp_path / "in"), ["kept"], {}, tmp_path / "out")["kept"] == 1


@pytest.mark.parametrize("encoding", ["DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY"])
@pytest.mark.parametrize(
    ("version", "compression"), [("1.0", "none"), ("1.0", "lz4"), ("2.0", "snappy"), ("2.0", "zstd"), ("1.0", "gzip")]
)
def test_parquet_texts_in_a_delta_encoding_are_read(tmp_path, encoding, version, compression):
    texts = [None if n % 7 == 0 else f"The same start, then {'x' * (n * n % 999)}" for n in range(3000)]
    turns = [[{"role": "user", "content": text}] * (n % 4) for n, text in enumerate(texts)]
    columns = ("text", "messages.list.element.content", "messages.list.element.role")
    pq.write_table(
        pa.table({"text": texts, "messages": turns, "label": ["good"] * 3000}),
        tmp_path / "a.parquet",
        use_dictionary=["label"],
        column_encoding=dict.fromkeys(columns, encoding),
        data_page_version=version,
        compression=compression,
        row_group_size=1200,
        data_page_size=50_000,
    )
    source = open_source(tmp_path / "a.parquet")
    expected = [{"text": t, "messages": m, "label": "good"} for t, m in zip(texts, turns, strict=True)]
    assert [row.record for row in read_rows(source)] == expected
    write_outputs(source, ["kept"] * 3000, {}, tmp_path / "out")
    assert pq.read_table(tmp_path / "out" / "kept.parquet").to_pylist() == expected


def test_parquet_row_groups_may_differ_in_encoding(tmp_path):
    schema = pa.schema({"text": pa.string()})
    delta = {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}}
    with pq.ParquetWriter(tmp_path / "a.parquet", schema, **delta) as writer:
        for texts in ([], ["a", "ab"], [], ["b"]):  # a group without rows has no encoding
            writer.write_table(pa.table({"text": texts}, schema))
    assert [row.record["text"] for row in rows_of(tmp_path / "a.parquet")] == ["a", "ab", "b"]


VIEW = pa.list_view(pa.string())


@pytest.mark.parametrize("kind", [VIEW, pa.large_list_view(pa.int8()), pa.list_(VIEW), pa.struct([("a", VIEW)])])
def test_a_list_view_which_can_t_be_written_again_is_refused_at_once(tmp_path, kind):
    pq.write_table(pa.table({"text": ["a"], "tags": pa.array([None], kind)}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"^a.parquet: column 'tags' is a list view; write it as a list"):
        rows_of(tmp_path / "a.parquet")


def test_parquet_with_a_column_twice_is_refused(tmp_path):
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"^a.parquet: column 'text' appears twice"):
        rows_of(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("name", "data", "problem"),
    [
        ("a.jsonl", None, "no such file"),
        ("a.jsonl", b"", "the file is empty"),
        ("a.jsonl", b" \n\r\n", "the file is empty"),
        ("a.jsonl", gzip.compress(b"", mtime=0), "the file is empty"),
        ("a.bin", b"\x7fELF\0\0", "unknown format"),
        ("a.jsonl", b"one word", "unknown format"),
        ("a.bin", b"one\rword", "unknown format"),
        ("a.csv", b"a,b\r1,2\r", "lines must end in a newline"),
        ("a.csv", b"PK\x03\x04", "Excel"),
        ("a.jsonl", '{"a": 1}'.encode("utf-16"), "UTF-16"),
        ("a.jsonl", '{"a": 1}'.encode("utf-16-le"), "UTF-16"),
        ("a.csv", "a,b\n1,2\n".encode("utf-16-be"), "UTF-16"),
        ("a.jsonl", '{"a": 1}'.encode("utf-32"), "UTF-32"),
        ("a.jsonl.bz2", bz2.compress(GOOD), "bzip2"),
        ("a.jsonl.xz", lzma.compress(GOOD), "xz file"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("a.parquet", b"PAR1 and no more", "not a readable parquet"),
        ("a.jsonl", gzip.compress(GOOD * 9999, mtime=0)[:-30], "can't be read"),
    ],
)
def test_what_can_not_be_opened_is_one_line_naming_the_file(tmp_path, name, data, problem):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as excinfo:
        rows_of(tmp_path / name)
    assert problem in one_line(excinfo) and name in str(excinfo.value)


def test_stdin_is_copied_so_that_it_can_be_read_twice(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(GOOD + b"\n" + GOOD)))
    source = open_source("-")
    assert [row.source for row in read_rows(source)] == ["-", "-"] == [row.source for row in read_rows(source)]


def test_empty_stdin_is_refused(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))
    with pytest.raises(UserError, match=r"^stdin: the file is empty"):
        open_source("-")


def test_a_csv_row_of_a_byte_order_mark_alone_is_a_row(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"text\na\n\xef\xbb\xbf\nb\n")
    assert [row.record for row in rows_of(tmp_path / "a.csv")] == [{"text": "a"}, {"text": "\ufeff"}, {"text": "b"}]
