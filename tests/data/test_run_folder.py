"""A run's input is found again, wherever the next command is given."""

from types import SimpleNamespace

import datasets

from gradshield.data import open_source
from gradshield.data.run_folder import plan_of, rows_of_run

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
