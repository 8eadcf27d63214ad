"""A run's input is found again, wherever the next command is given."""

import shutil
from types import SimpleNamespace

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gradshield.base.errors import UserError
from gradshield.data import open_source
from gradshield.data.run_folder import SavedRun, _unusable, catch_write_errors, plan_of, read_table, rows_of_run

NAN = float("nan")
MODEL = SimpleNamespace(name="tiny", fingerprint="f")


def test_a_saved_dataset_is_found_from_another_directory(tmp_path, monkeypatch):
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "data" / "saved")
    monkeypatch.chdir(tmp_path)
    plan = plan_of(open_source("data/saved"), MODEL, "text", {"split": "train"})
    monkeypatch.chdir("data")
    assert [row.record for row in rows_of_run(plan)] == [{"text": "a"}]


def test_the_id_of_a_hub_dataset_stays_as_it_was_given(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_dict({"text": ["a"]}))
    assert plan_of(open_source("org/name"), MODEL, "text", {}).input.path == "org/name"


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("place", [None, "a:1"]),
        ("place", [1, 2]),
        ("group", pa.nulls(2, pa.string())),
        ("verdict", ["kept", None]),
        ("verdict", ["kept", "harmless"]),
        ("score", [1, 2]),
        ("score", [1.0, None]),
    ],
)
def test_scores_of_another_kind_than_a_run_writes_are_one_line(tmp_path, column, values):
    columns = {"place": ["a:1", "a:2"], "group": ["a", "a"], "verdict": ["kept", "set aside"], "score": [1.0, NAN]}
    pq.write_table(pa.table(columns), tmp_path / "scores.parquet")
    assert len(read_table(tmp_path, coded=("group", "verdict"))) == 2
    pq.write_table(pa.table(columns | {column: values}), tmp_path / "scores.parquet")
    with pytest.raises(UserError, match=r"scores.parquet: can't be read \(.*; filter again"):
        read_table(tmp_path, coded=("group", "verdict"))


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("input", "layout", "no such"),
        ("settings", "split", None),
        ("settings", "columns", "prompt"),
        ("settings", "columns", None),
        ("settings", "trainer", "no such"),
    ],
)
def test_what_a_run_yaml_must_say_to_read_its_rows_again_is_looked_at_first(part, name, value):
    saved = {"input": {"layout": "messages"}, "settings": {"split": "train", "columns": None, "trainer": "trl"}}

    def unusable():
        return _unusable(SavedRun.model_construct(input=SimpleNamespace(**saved["input"]), settings=saved["settings"]))

    assert unusable() is None
    del saved[part][name]
    saved[part] |= {} if value is None else {name: value}
    assert unusable() == f"{part}.{name}"


def test_a_folder_that_cannot_be_copied_is_one_line(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a").symlink_to("nowhere")
    with pytest.raises(UserError) as told, catch_write_errors(tmp_path / "run"):
        shutil.copytree(tmp_path / "model", tmp_path / "copy")
    assert "No such file" in str(told.value) and "[(" not in str(told.value)
    assert " -o" not in str(told.value)  # `apply` and `review` have none
