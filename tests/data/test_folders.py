"""Many files as one source: folders, saved datasets, and datasets under a Hub id."""

import hashlib
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data.read import GOOD, one_line, rows_of

from gradshield.base.errors import UserError
from gradshield.data import open_source


def test_a_folder_is_read_in_sorted_order_without_hidden_files(tmp_path):
    for name in ("b/c.jsonl", "b/a.json", "a.jsonl", ".git/x.jsonl", ".x.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(json.dumps({"text": name}).encode())
    (tmp_path / "README.md").write_text("# about")
    (tmp_path / "empty.jsonl").write_bytes(b"")
    rows = rows_of(tmp_path)
    assert [row.record["text"] for row in rows] == [row.source for row in rows] == ["a.jsonl", "b/a.json", "b/c.jsonl"]
    assert [row.index for row in rows] == [0, 1, 2]


RUN = "input:\n  path: a\nmodel:\n  name: a\n  fingerprint: b\nsettings:\n  split: train\nversions:\n  torch: '2'\n"
EVALUATION = RUN.partition("model:")[1] + RUN.partition("model:")[2]


@pytest.mark.parametrize("name", ["run.yaml", "eval.yaml"])
@pytest.mark.parametrize("content", ["", "name: a benchmark of the Hub\n", "model: {fingerprint: x}\n", "\xff", "- 1"])
def test_a_file_with_a_run_s_name_hides_no_rows(tmp_path, name, content):
    (tmp_path / "x").mkdir()
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    (tmp_path / "x" / "b.jsonl").write_bytes(GOOD)
    (tmp_path / "x" / name).write_text(content)
    assert open_source(tmp_path).names == open_source(tmp_path, out=tmp_path / "run").names == ("a.jsonl", "x/b.jsonl")


@pytest.mark.parametrize(("name", "content"), [("run.yaml", RUN), ("eval.yaml", EVALUATION)])
def test_a_run_among_the_data_is_refused_unless_it_is_the_one_that_is_written(tmp_path, name, content):
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    for folder in ("runs/one", "runs/one/kept"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "b.jsonl").write_bytes(GOOD)
    (tmp_path / "runs" / "one" / name).write_text(content)
    for out in (None, tmp_path / "runs" / "two", tmp_path / "runs" / "one" / "kept"):
        with pytest.raises(UserError, match=r"runs/one: .*move it out of .*, or give the files by name") as excinfo:
            open_source(tmp_path, out=out)
        assert one_line(excinfo)
    own = (tmp_path / "runs" / "one", tmp_path / "runs" / ".." / "runs" / "one", tmp_path / "runs" / "one" / "screen")
    for out in own:  # the last: where `tune` keeps the run of its screening
        assert open_source(tmp_path, out=out).names == ("a.jsonl",)


def test_mixed_formats_are_refused_unless_one_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    (tmp_path / "b.csv").write_bytes(b"a,b\n1,2\n")
    with pytest.raises(UserError) as excinfo:
        open_source(tmp_path)
    assert "a.jsonl is jsonl, b.csv is csv" in one_line(excinfo)
    assert [row.source for row in rows_of(tmp_path, format="csv")] == ["b.csv"]


def test_checksum_follows_bytes_and_names(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    one, folder = open_source(tmp_path / "a.jsonl").sha256, open_source(tmp_path).sha256
    assert one == hashlib.sha256(GOOD).hexdigest()
    (tmp_path / "a.jsonl").rename(tmp_path / "b.jsonl")
    assert open_source(tmp_path).sha256 != folder


@pytest.mark.parametrize("name", ["b.jsonl.bz2", "b.ndjson.bz2", "b.pq.xz"])
def test_a_file_of_rows_that_can_not_be_unpacked_is_told(tmp_path, name):
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    (tmp_path / "README.md").write_text("rows")
    (tmp_path / name).write_bytes(b"BZh9")
    with pytest.raises(UserError, match=f"{name}: an unsupported compression format"):
        open_source(tmp_path)


def test_a_folder_without_data_is_refused(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="no jsonl, json, csv, parquet or text files"):
        open_source(tmp_path)


def test_a_saved_dataset_is_read_by_split(tmp_path):
    import datasets

    data = datasets.Dataset.from_dict({"text": ["a", "b"]})
    datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(tmp_path / "saved")
    assert [row.record for row in rows_of(tmp_path / "saved")] == [{"text": "a"}, {"text": "b"}]
    assert [row.record for row in rows_of(tmp_path / "saved", split="test")] == [{"text": "b"}]
    with pytest.raises(UserError, match="choose one of train, test"):
        open_source(tmp_path / "saved", split="dev")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder as a dataset lies on the Hub; `datasets` loads it under the id org/name, and knows no other."""
    import datasets

    real, place = datasets.load_dataset, tmp_path / "hub"

    def load_dataset(path, **options):
        return real(str(place) if path == "org/name" else path, **options)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (place / "data").mkdir(parents=True)
    return place


def test_a_folder_of_parquet_files_as_on_the_hub_gives_the_rows_that_the_id_gives(hub):
    for split, part, texts in (("train", 0, ["a", "b"]), ("train", 1, ["c"]), ("test", 0, ["d"])):
        pq.write_table(pa.table({"text": texts}), hub / "data" / f"{split}-{part:05d}-of-00002.parquet")
    for split, texts in (("train", ["a", "b", "c"]), ("test", ["d"])):
        for path in (hub, "org/name"):
            assert [row.record["text"] for row in rows_of(path, split=split)] == texts
    assert open_source("org/name").sha256 == open_source("org/name").sha256  # or a run could not be taken up
    for path in (hub, "org/name"):
        with pytest.raises(UserError, match=r"dev.*train.*--split") as excinfo:
            open_source(path, split="dev")
        assert one_line(excinfo)
    (hub / "data" / "more.parquet").write_bytes((hub / "data" / "test-00000-of-00002.parquet").read_bytes())
    assert len(rows_of(hub)) == 5  # no split by name: every file is read


@pytest.mark.parametrize("name", ["data/{}-00000-of-00001-a09b74b3ef9c3b56.parquet", "default/{}/0000.parquet"])
def test_older_names_of_the_hub_and_those_of_its_conversion_tell_the_split_too(tmp_path, name):
    for split in ("train", "test"):
        (tmp_path / name.format(split)).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"text": [split]}), tmp_path / name.format(split))
    for place in (tmp_path, (tmp_path / name).parents[name.count("/") - 1]):
        for split in ("train", "test"):
            assert [row.record["text"] for row in rows_of(place, split=split)] == [split]


def test_a_hub_id_of_jsonl_files_is_read_and_its_configurations_are_named(hub):
    (hub / "data" / "train.jsonl").write_bytes(b'{"prompt": "a", "n": 1}\n{"prompt": "b", "n": null}\n')
    assert [row.record for row in rows_of("org/name")] == [{"prompt": "a", "n": 1}, {"prompt": "b", "n": None}]
    (hub / "README.md").write_text(
        "---\nconfigs:\n- config_name: one\n  data_files: data/train.jsonl\n- config_name: two\n"
        "  data_files: data/train.jsonl\n---\n"
    )
    with pytest.raises(UserError, match=r"one.*two.*save_to_disk") as excinfo:
        open_source("org/name")
    assert one_line(excinfo)


def test_a_hub_id_offline_is_one_line_that_says_what_to_do(hub):
    with pytest.raises(UserError, match=r"^org/none: .*check the id and the connection, or download it") as excinfo:
        open_source("org/none")
    assert one_line(excinfo)


def test_a_hub_id_is_tried_only_where_there_is_no_such_path(monkeypatch):
    import datasets

    def load_dataset(path, split, streaming):
        if path == "org/name":
            return datasets.Dataset.from_dict({"text": [split]})
        raise ConnectionError("offline\nreally")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (row,) = rows_of("org/name", split="test")
    assert row.record == {"text": "test"} and row.source == "org/name" and row.line == 1
    with pytest.raises(UserError) as excinfo:
        open_source("org/none")
    assert "neither a local path nor a reachable dataset" in one_line(excinfo)
    with pytest.raises(UserError, match="no such file"):
        open_source("data/train.jsonl")
