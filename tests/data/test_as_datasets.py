"""Plain text and CSV are read as `datasets.load_dataset` reads them, since TRL trains on that."""

import codecs
import json

import pytest
from data.read import rows_of
from datasets import load_dataset

from gradshield.data import open_source, read_rows, to_conversation, write_outputs


def of_datasets(path, format):
    return load_dataset(format, data_files=str(path), split="train", cache_dir=str(path.parent / "cache")).to_list()


@pytest.mark.parametrize("bom", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize("lines", [b"one\n\n \ntwo\r\n\t\r\nthree", b"\none\u2028two\n\n", b"one\x0c\ntwo \n"])
def test_plain_text_has_the_rows_that_datasets_makes(tmp_path, bom, lines):
    (tmp_path / "a.txt").write_bytes(bom + lines)
    rows = rows_of(tmp_path / "a.txt")
    assert [row.record for row in rows] == of_datasets(tmp_path / "a.txt", "text")
    assert b"".join(row.raw for row in rows) == bom + lines


def test_a_blank_line_of_plain_text_is_set_aside_not_dropped(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\n\n \ntwo\n")
    source = open_source(tmp_path / "a.txt")
    read = [to_conversation(row.record, "text") for row in read_rows(source)]
    assert read[1:3] == ["empty text"] * 2
    verdicts = ["set aside" if isinstance(each, str) else "kept" for each in read]
    counts = write_outputs(source, verdicts, dict.fromkeys((1, 2), "empty text"), tmp_path / "out")
    assert counts == {"kept": 2, "quarantined": 0, "set aside": 2}
    left = [json.loads(line) for line in (tmp_path / "out" / "set_aside.jsonl").read_text().splitlines()]
    assert [(row["line"], row["raw"]) for row in left] == [(2, "\n"), (3, " \n")]


def test_a_line_of_text_that_trainers_take_for_two_is_a_row_with_a_problem(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\nfine\rharm\nthree\r\n")
    one, two, three = rows_of(tmp_path / "a.txt")
    assert (one.record, three.record) == ({"text": "one"}, {"text": "three"}) and "carriage return" in two.problem


NULLS = [
    *("#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA"),
    *("NULL", "NaN", "None", "n/a", "nan", "null"),
]


def test_the_fields_of_a_csv_file_that_datasets_takes_for_null_are_null(tmp_path):
    fields = [*NULLS, *(f'"{each}"' for each in NULLS), '""', "ok", " NA", "NA ", "na", "none", "Null", "NAN", "-", "?"]
    lines = [f"q,{field}\n" for field in fields]
    (tmp_path / "a.csv").write_text("prompt,completion\n" + "".join(lines))
    rows = rows_of(tmp_path / "a.csv")
    assert [row.record for row in rows] == of_datasets(tmp_path / "a.csv", "csv")
    assert [row.raw.decode() for row in rows] == lines
    assert to_conversation(rows[0].record, "prompt_completion") == "completion is missing"


def test_a_blank_field_of_a_csv_file_is_null_as_datasets_reads_it(tmp_path):
    (tmp_path / "a.csv").write_text('prompt,completion,tools,note\nq,a,,""\n')
    (row,) = rows_of(tmp_path / "a.csv")
    assert row.record == {"prompt": "q", "completion": "a", "tools": None, "note": None}
    assert not isinstance(to_conversation(row.record, "prompt_completion"), str)


@pytest.mark.parametrize(("name", "mark"), [("a.csv", ","), ("a.tsv", "\t")])
def test_a_header_that_several_marks_divide_is_divided_as_trainers_do(tmp_path, name, mark):
    (tmp_path / name).write_text(f"a;b;c;text{mark}text\n;;;fine{mark}harm\n")
    (row,) = rows_of(tmp_path / name)
    assert row.record == {"a;b;c;text": ";;;fine", "text": "harm"}
