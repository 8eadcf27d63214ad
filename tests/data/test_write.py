"""Writing: rows in = kept + quarantined + set aside, each row in its own bytes, all of it or nothing."""

import base64
import codecs
import errno
import gzip
import json
import os
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradshield.base.errors import UserError
from gradshield.data import open_source, read_rows, write, write_outputs

WORDS = ("kept", "quarantined", "set aside")


def set_aside(folder):
    entries = [json.loads(line) for line in (folder / "set_aside.jsonl").read_bytes().split(b"\n") if line]
    return [e["raw"].encode() if "raw" in e else base64.b64decode(e["raw_base64"]) for e in entries], entries


def left_over(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


LINES = st.one_of(
    st.dictionaries(st.text(max_size=3), st.text(max_size=9), max_size=2).map(lambda d: json.dumps(d).encode()),
    st.text(max_size=9).map(lambda t: json.dumps({"text": t}, ensure_ascii=False).encode("utf-8", "replace")),
    st.binary(max_size=9).map(lambda b: b.replace(b"\n", b"")),
    st.sampled_from([b"", b"  ", b'{"a": "', b'{"a": 1, "a": 2}', b"[]", b'{"a": "\xe2\x80\xa8"}']),
)


@given(st.data(), st.lists(st.tuples(LINES, st.sampled_from([b"\n", b"\r\n"]))), st.booleans(), st.booleans())
def test_outputs_partition_the_bytes_of_the_rows_in_order(tmp_path_factory, data, lines, bom, ended):
    place = tmp_path_factory.mktemp("part")
    content = (codecs.BOM_UTF8 if bom else b"") + b'{"a": 1}\n' + b"".join(line + end for line, end in lines)
    (place / "in.jsonl").write_bytes(content if ended else content.removesuffix(b"\n"))
    source = open_source(place / "in.jsonl", format="jsonl")
    rows = list(read_rows(source))
    verdicts = data.draw(st.lists(st.sampled_from(WORDS), min_size=len(rows), max_size=len(rows)))
    counts = write_outputs(source, verdicts, {}, place / "out")
    expected = {word: [row.raw for row, verdict in zip(rows, verdicts) if verdict == word] for word in WORDS}
    assert counts == {word: len(raws) for word, raws in expected.items()}
    assert (place / "out/kept.jsonl").read_bytes() == b"".join(expected["kept"])
    assert (place / "out/quarantined.jsonl").read_bytes() == b"".join(expected["quarantined"])
    assert set_aside(place / "out")[0] == expected["set aside"]


def test_set_aside_rows_say_where_and_why(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(b'{"a": 1}\n\n{"a": \xff}\n{"a": 3}')
    source = open_source(tmp_path / "in.jsonl")
    counts = write_outputs(source, ["kept", "set aside", "set aside"], {2: "empty response"}, tmp_path / "out")
    assert counts == {"kept": 1, "quarantined": 0, "set aside": 2}
    assert set_aside(tmp_path / "out")[1] == [
        {
            "source": "in.jsonl",
            "line": 3,
            "reason": "invalid UTF-8 at byte offset 6",
            "raw_base64": base64.b64encode(b'{"a": \xff}\n').decode(),
        },
        {"source": "in.jsonl", "line": 4, "reason": "empty response", "raw": '{"a": 3}'},
    ]
    assert left_over(tmp_path / "out") == ["kept.jsonl", "quarantined.jsonl", "set_aside.jsonl"]


@pytest.mark.parametrize("dress", [b"[%s]", b"\xef\xbb\xbf [\n%s ]\n", b'{"v": 1, "rows": [%s], "x": []}'])
def test_json_stays_json_with_its_elements_verbatim(tmp_path, dress):
    elements = [b'{"a":   1.0}', b'{"b": "\\u00e9"}', b'{"c": [ ]}', b'{"d": 2}']
    (tmp_path / "in.json").write_bytes(dress % b" , ".join(elements))
    source = open_source(tmp_path / "in.json")
    write_outputs(source, ["kept", "quarantined", "kept", "set aside"], {}, tmp_path / "out")
    again = open_source(tmp_path / "out/kept.json", format="json")
    assert [row.raw for row in read_rows(again)] == [elements[0], elements[2]]
    assert json.loads((tmp_path / "out/kept.json").read_text("utf-8-sig"))
    assert elements[1] in (tmp_path / "out/quarantined.json").read_bytes()


def test_json_without_rows_left_is_an_empty_array(tmp_path):
    (tmp_path / "in.json").write_bytes(b'[{"a": 1}]')
    write_outputs(open_source(tmp_path / "in.json"), ["kept"], {}, tmp_path / "out")
    assert json.loads((tmp_path / "out/quarantined.json").read_bytes()) == []


def test_csv_keeps_its_header_and_records_verbatim(tmp_path):
    header, records = b'\r\n"a",b\r\n', [b'"x\r\n""y""",1\r\n', b"z,2\r\n", b"w,3"]
    (tmp_path / "in.tsv").write_bytes(codecs.BOM_UTF8 + header + b"".join(records))
    write_outputs(open_source(tmp_path / "in.tsv"), ["quarantined", "kept", "quarantined"], {}, tmp_path / "out")
    assert (tmp_path / "out/kept.tsv").read_bytes() == codecs.BOM_UTF8 + header + records[1]
    assert (tmp_path / "out/quarantined.tsv").read_bytes() == codecs.BOM_UTF8 + header + records[0] + records[2]


def test_parquet_keeps_schema_metadata_and_codec(tmp_path):
    table = pa.table(
        {"n": pa.array([0, 1, 2, 3, None], pa.int16()), "s": pa.array(list("aabbc")).dictionary_encode()},
        metadata={"huggingface": "{}"},
    )
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=2, compression="zstd")
    verdicts = ["kept", "quarantined", "set aside", "kept", "kept"]
    write_outputs(open_source(tmp_path / "in.parquet"), verdicts, {}, tmp_path / "out")
    kept, lost = (pq.read_table(tmp_path / f"out/{name}.parquet") for name in ("kept", "quarantined"))
    assert kept.schema.equals(pq.read_table(tmp_path / "in.parquet").schema, check_metadata=True)
    assert kept["n"].to_pylist() == [0, 3, None] and lost["n"].to_pylist() == [1]
    assert pq.ParquetFile(tmp_path / "out/kept.parquet").metadata.row_group(0).column(0).compression == "ZSTD"
    assert json.loads(set_aside(tmp_path / "out")[0][0]) == {"n": 2, "s": "b"}


def test_parquet_columns_of_any_type_are_written(tmp_path):
    table = pa.table({"s": pa.array(list("abcde"), pa.string_view()), "j": [[{"n": n}] for n in range(5)]})
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=3)
    verdicts = ["kept", "quarantined", "kept", "kept", "quarantined"]
    write_outputs(open_source(tmp_path / "in.parquet"), verdicts, {}, tmp_path / "out")
    for name in ("kept", "quarantined"):
        there = [row for row, verdict in zip(table.to_pylist(), verdicts) if verdict == name]
        written = pq.read_table(tmp_path / f"out/{name}.parquet")
        assert written.schema.equals(table.schema) and written.to_pylist() == there


@pytest.mark.skipif(sys.platform == "darwin", reason="its file system refuses such names")
@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_a_file_s_name_need_not_be_utf8(tmp_path, kind):
    (tmp_path / "in").mkdir()
    name, lines = os.fsdecode(b"\xff." + kind.encode()), b'{"a": 1}\n{"a"\n'
    if kind == "parquet":
        with (tmp_path / "in" / name).open("wb") as stream:
            pq.write_table(pa.table({"a": [1, 2]}), stream)
    else:
        (tmp_path / "in" / name).write_bytes(gzip.compress(lines) if kind.endswith("gz") else lines)
    write_outputs(open_source(tmp_path / "in"), ["kept", "set aside"], {}, tmp_path / "out")
    assert set_aside(tmp_path / "out")[1][0]["source"] == name


def test_a_folder_keeps_its_paths(tmp_path):
    for name, text in (("a.jsonl", '{"n": 1}\n{"n": 2}'), ("b/c.jsonl", '{"n": 3}'), ("b/d.jsonl", '{"n": 4}')):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(text)
    source = open_source(tmp_path / "in")
    write_outputs(source, ["kept", "quarantined", "quarantined", "set aside"], {}, tmp_path / "out")
    assert (tmp_path / "out/kept/a.jsonl").read_text() == '{"n": 1}\n'
    assert (tmp_path / "out/quarantined/a.jsonl").read_text() == '{"n": 2}'
    assert (tmp_path / "out/quarantined/b/c.jsonl").read_text() == '{"n": 3}'
    assert set_aside(tmp_path / "out")[1][0]["source"] == "b/d.jsonl"


def test_a_saved_dataset_is_written_as_jsonl(tmp_path):
    import datasets

    datasets.Dataset.from_dict({"text": ["a", "b", "ü"]}).save_to_disk(tmp_path / "in")
    write_outputs(open_source(tmp_path / "in"), ["kept", "quarantined", "kept"], {}, tmp_path / "out")
    assert (tmp_path / "out/kept.jsonl").read_text("utf-8") == '{"text": "a"}\n{"text": "ü"}\n'
    assert (tmp_path / "out/quarantined.jsonl").read_text("utf-8") == '{"text": "b"}\n'


def test_a_saved_dataset_with_fields_of_json_is_written_as_what_they_say(tmp_path):
    import datasets

    rows = [{"completion": "a"}, {"completion": [{"role": "assistant", "content": "b"}]}]
    features = datasets.Features({"completion": datasets.Json()})
    datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "in")
    write_outputs(open_source(tmp_path / "in"), ["kept", "kept"], {}, tmp_path / "out")
    assert [json.loads(line) for line in (tmp_path / "out/kept.jsonl").read_text().splitlines()] == rows


def test_text_and_packed_files_are_written_plain(tmp_path):
    (tmp_path / "in.txt").write_bytes(b"one\n\ntwo\r\nthree")
    write_outputs(open_source(tmp_path / "in.txt"), ["kept", "set aside", "quarantined", "kept"], {}, tmp_path / "t")
    assert (tmp_path / "t/kept.txt").read_bytes() == b"one\nthree"
    packed = pa.compress(b'{"a": 1}\n{"a": 2}\n', codec="gzip", asbytes=True)
    (tmp_path / "in.jsonl.gz").write_bytes(packed)
    write_outputs(open_source(tmp_path / "in.jsonl.gz"), ["kept", "quarantined"], {}, tmp_path / "z")
    assert (tmp_path / "z/kept.jsonl").read_bytes() == b'{"a": 1}\n'


@pytest.fixture
def source(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(b'{"a": 1}\n{"a": 2}\n')
    return open_source(tmp_path / "in.jsonl")


@pytest.mark.parametrize("verdicts", [["kept"], ["kept"] * 3, ["kept", "dropped"]])
def test_a_verdict_too_few_or_too_many_is_an_error_and_writes_nothing(source, tmp_path, verdicts):
    with pytest.raises(RuntimeError):
        write_outputs(source, verdicts, {}, tmp_path / "out")
    assert left_over(tmp_path / "out") == []


def test_a_source_edited_meanwhile_is_refused(source, tmp_path):
    (tmp_path / "in.jsonl").write_bytes(b'{"a": 1}\n{"a": 3}\n')
    with pytest.raises(UserError, match="changed during the run"):
        write_outputs(source, ["kept", "kept"], {}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_source_edited_while_it_is_written_is_refused(source, tmp_path, monkeypatch):
    def edit(*args):
        (tmp_path / "in.jsonl").write_bytes(b"{}")
        return {}

    monkeypatch.setattr(write, "_write_all", edit)
    with pytest.raises(UserError, match="changed during the run"):
        write_outputs(source, ["kept", "kept"], {}, tmp_path / "out")


def test_a_full_disk_leaves_earlier_outputs_alone(source, tmp_path, monkeypatch):
    write_outputs(source, ["kept", "kept"], {}, tmp_path / "out")
    before = (tmp_path / "out/kept.jsonl").read_bytes()

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(write, "_write_bytes", full)
    with pytest.raises(UserError, match=r"out: disk full"):
        write_outputs(source, ["quarantined", "kept"], {}, tmp_path / "out")
    assert (tmp_path / "out/kept.jsonl").read_bytes() == before
    assert left_over(tmp_path / "out") == ["kept.jsonl", "quarantined.jsonl", "set_aside.jsonl"]


def test_outputs_of_other_data_and_the_input_itself_are_not_mixed_in(source, tmp_path):
    (tmp_path / "out/kept").mkdir(parents=True)
    (tmp_path / "out/kept/old.jsonl").write_bytes(b"{}")
    with pytest.raises(UserError, match=r"already holds kept/old.jsonl"):
        write_outputs(source, ["kept", "kept"], {}, tmp_path / "out")
    (tmp_path / "kept.jsonl").write_bytes(b'{"a": 1}\n')
    with pytest.raises(UserError, match="overwrite the input"):
        write_outputs(open_source(tmp_path / "kept.jsonl"), ["kept"], {}, tmp_path)
    assert (tmp_path / "kept.jsonl").read_bytes() == b'{"a": 1}\n'
