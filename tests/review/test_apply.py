"""`apply` writes what follows from scores and decisions: without any, the same bytes, whatever was killed before."""

import json
import math
import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from review.made import chat, digests, make_run, verdicts, write_jsonl

from gradshield.base.errors import UserError
from gradshield.base.storage import exclusive_lock
from gradshield.data.run_folder import row_of_run
from gradshield.review import store
from gradshield.review.apply import apply_decisions
from gradshield.review.state import Review

SCORES = [-2.0, -0.5, 0.5, 2.0]


def review(out: Path) -> dict:
    return yaml.safe_load((out / "run.yaml").read_text(encoding="utf-8"))["review"]


def source(folder: Path, kind: str) -> Path:
    """Four rows and, where the format can hold one, a broken row in their middle."""
    pairs = [{"prompt": f"say  {n}", "completion": f"é {n}\u2028"} for n in range(4)]
    file = folder / f"train.{kind}"
    if kind == "jsonl":
        lines = [json.dumps(pair).replace(": ", ":   ") for pair in pairs]
        file.write_bytes("\r\n".join([*lines[:2], '{"prompt": "half', *lines[2:]]).encode())
    elif kind == "csv":
        body = "".join(f'"say ""{n}""\n{n}",  é {n}\r\n' for n in range(4))
        file.write_bytes(f"prompt,completion\r\n{body}".encode())
    elif kind == "json":
        file.write_text("[" + " ,\n ".join(json.dumps(pair) for pair in pairs) + "]\n", encoding="utf-8")
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(pairs), file, compression="zstd", row_group_size=3)
    elif kind == "folder":
        (file / "deep").mkdir(parents=True)
        write_jsonl(file / "a.jsonl", pairs[:1])
        write_jsonl(file / "deep" / "b.jsonl", pairs[1:])
    elif kind == "hub":
        datasets.Dataset.from_list(pairs).save_to_disk(file)
    return file


@pytest.fixture
def run(tmp_path) -> Path:
    rows = [chat(f"request {n}", f"answer {n}", source="a" if n < 2 else "b") for n in range(4)]
    file = write_jsonl(tmp_path / "train.jsonl", [*rows[:2], '{"messages": "broken', *rows[2:]])
    return make_run(tmp_path / "run", file, SCORES)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "json", "parquet", "folder", "hub"])
def test_without_decisions_every_file_is_the_same_again(tmp_path, kind):
    out = make_run(tmp_path / "run", source(tmp_path, kind), SCORES)
    before = digests(out)
    counts = apply_decisions(out)
    assert digests(out) == before and len(before) >= 5
    assert counts.kept == counts.quarantined == 2 and counts.moved_by_a_person == 0


@pytest.mark.parametrize("kind", ["jsonl", "csv", "json", "parquet", "folder", "hub"])
def test_moved_rows_go_verbatim_where_a_person_put_them_and_come_back_when_it_is_taken_back(tmp_path, kind):
    file = source(tmp_path, kind)
    out = make_run(tmp_path / "run", file, SCORES)
    before = digests(out)
    last = 5 if kind == "jsonl" else 4
    entries = [store.decide(out, 1, "quarantined", "", "ann"), store.decide(out, last, "kept", "fine", "bob")]
    apply_decisions(out)
    middle = ["kept", *(["set aside"] if kind == "jsonl" else []), "quarantined"]
    expected = ["quarantined", *middle, "kept"]
    assert verdicts(out) == expected
    twin = make_run(tmp_path / "twin", file, [1.0, -1.0, 1.0, -1.0])  # the run whose scores alone say so
    for name in digests(out):
        if name not in ("run.yaml", "scores.parquet", "report.html"):
            assert (out / name).read_bytes() == (twin / name).read_bytes(), name
    for entry in entries:
        store.undo(out, entry.id, "ann")
    apply_decisions(out)
    assert digests(out) == before


def test_run_yaml_says_who_moved_which_row_when_and_why(run):
    store.decide(run, 1, "quarantined", "smells", "ann")
    agreed = store.decide(run, 4, "quarantined", "", "ann")
    moved = store.decide(run, 5, "kept", "", "bob")
    summary = yaml.safe_load((run / "run.yaml").read_text())["summary"]
    apply_decisions(run)
    said = review(run)
    assert said["decided"] == 3 and said["threshold"] == {"value": 0.0}
    assert (said["kept"], said["quarantined"], said["set_aside"]) == (2, 2, 1)
    assert [m["row"] for m in said["moved"]] == [1, 5] and agreed.row == 4
    assert said["moved"][0]["note"] == "smells" and said["moved"][0]["to"] == "quarantined"
    assert said["moved"][1] == {"row": 5, "to": "kept", "who": "bob", "when": moved.at}
    assert yaml.safe_load((run / "run.yaml").read_text())["summary"] == summary


def test_a_review_notes_again_whether_trl_can_load_the_rows_that_are_kept(tmp_path):
    other = {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}
    file = write_jsonl(tmp_path / "mixed.jsonl", [chat("request 0", "answer 0"), chat("request 1", "answer 1"), other])
    out = make_run(tmp_path / "run", file, [-1.0, 1.0, 1.0])
    assert apply_decisions(out).trl_note == ""
    moved = store.decide(out, 3, "kept", "", "ann")
    note = apply_decisions(out).trl_note
    assert "(messages: 1, prompt/completion: 1)" in note and review(out)["trl_note"] == note
    assert note in (out / "report.html").read_text(encoding="utf-8").replace("&#39;", "'")
    store.undo(out, moved.id, "ann")
    store.decide(out, 2, "kept", "", "ann")
    assert apply_decisions(out).trl_note == "" and "trl_note" not in review(out)
    mapped = make_run(tmp_path / "mapped", file, [-1.0, -1.0, -1.0], trainer="axolotl")
    assert apply_decisions(mapped).trl_note == ""  # TRL's rules do not apply


def test_a_moved_threshold_moves_the_rows_that_nobody_decided(run):
    store.decide(run, 2, "kept", "", "ann")
    store.move_threshold(run, -1.0, "ann")
    counts = apply_decisions(run)
    assert verdicts(run) == ["kept", "kept", "set aside", "quarantined", "quarantined"]
    assert counts.moved_by_the_threshold == 1 and counts.moved_by_a_person == 1
    assert review(run)["threshold"]["value"] == -1.0 and review(run)["threshold"]["who"] == "ann"
    store.move_threshold(run, math.inf, "ann")
    apply_decisions(run)
    assert verdicts(run) == ["kept", "kept", "set aside", "kept", "kept"] and review(run)["threshold"]["value"] is None


def test_the_report_shows_what_people_decided(run):
    store.decide(run, 1, "quarantined", "smells <b>odd</b>", "ann")
    store.move_threshold(run, 1.0, "bob")
    apply_decisions(run)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "moved by <bdi>ann: smells &lt;b&gt;odd&lt;/b&gt;</bdi>" in page and "set by bob on " in page
    assert "2 of 5 rows quarantined" in page and ">moved by the threshold</th><td>1<" in page


def test_a_row_set_aside_is_moved_by_nobody(run):
    store.decide(run, 3, "kept", "", "ann")
    apply_decisions(run)
    assert verdicts(run)[2] == "set aside" and review(run)["set_aside"] == 1 and not review(run)["moved"]


def test_killed_at_any_moment_it_repeats_to_the_same_result(run, monkeypatch):
    store.decide(run, 1, "quarantined", "", "ann")
    store.move_threshold(run, 1.0, "ann")
    before = {p.name: p.read_bytes() for p in run.iterdir() if p.is_file() and not p.name.startswith("review")}
    apply_decisions(run)
    wanted = digests(run)
    real, moves = os.replace, 0
    for dies_at in range(1, 10):
        for name, content in before.items():
            (run / name).write_bytes(content)
        moves = 0

        def dying(a, b, dies_at=dies_at):
            nonlocal moves
            moves += 1
            if moves == dies_at:
                raise KeyboardInterrupt
            real(a, b)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", dying)
            try:
                apply_decisions(run)
            except KeyboardInterrupt:
                (run / ".writing-left").mkdir()
        apply_decisions(run)
        assert digests(run) == wanted and not list(run.glob(".writing-*"))
        if moves < dies_at:
            break
    assert moves == 6  # set aside, quarantined, kept, scores.parquet, report.html, run.yaml


def test_another_file_is_refused_and_nothing_is_written(run, tmp_path):
    before = digests(run)
    store.decide(run, 1, "quarantined", "", "ann")
    with open(tmp_path / "train.jsonl", "a") as stream:
        stream.write("\n")
    with pytest.raises(UserError, match="checksum"):
        apply_decisions(run)
    assert digests(run) == before


def test_a_link_keeps_the_name_that_was_filtered(tmp_path):
    blob = write_jsonl(tmp_path / "3f2a", [chat("a", "b"), chat("c", "d")])
    (tmp_path / "train.jsonl.link").symlink_to(blob)
    out = make_run(tmp_path / "run", tmp_path / "train.jsonl.link", [0.0, -1.0])
    saved = yaml.safe_load((out / "run.yaml").read_text())
    saved["input"]["path"] = str(blob)  # as `filter` saves it
    (out / "run.yaml").write_text(yaml.safe_dump(saved, sort_keys=False))
    apply_decisions(out)  # the report shows the path, too
    before = digests(out)
    apply_decisions(out)
    assert digests(out) == before


def test_only_one_writes_at_a_time(run):
    with exclusive_lock(run), pytest.raises(UserError, match="another command"):
        apply_decisions(run)
    apply_decisions(run)


def test_a_run_inside_its_own_input_reads_the_same_rows_again(tmp_path):
    data = source(tmp_path, "folder")
    out = make_run(data / "runs" / "one", data, SCORES)
    (data / "deep" / "run.yaml").write_bytes(b"")  # hides no rows
    before = digests(out)
    apply_decisions(out)
    assert digests(out) == before
    Review(out, None, "ann")
    assert row_of_run(out, 4)[1].source == "deep/b.jsonl"
    shutil.copytree(out, data / "another")
    for command in (apply_decisions, lambda run: row_of_run(run, 4)):
        with pytest.raises(UserError, match="another: a run of GradShield; move it out"):
            command(out)


@pytest.fixture
def foreign(run, tmp_path) -> Path:
    """A run of another file of as many rows, with the log of `run`."""
    store.decide(run, 4, "kept", "fine there", "ann")
    rows = [chat(f"other {n}", "answer") for n in range(5)]
    out = make_run(tmp_path / "foreign", write_jsonl(tmp_path / "other.jsonl", rows), [*SCORES, 3.0])
    shutil.copy(run / store.FILE, out / store.FILE)
    return out


def test_the_log_of_another_file_s_run_is_refused(run, foreign, tmp_path):
    twin = make_run(tmp_path / "twin", tmp_path / "other.jsonl", [*SCORES, 3.0])
    before = digests(foreign)
    for command in (apply_decisions, lambda out: Review(out, None, "ann"), lambda out: Review(twin, out, "ann")):
        with pytest.raises(UserError, match=r"review\.sqlite: it holds decisions on another file"):
            command(foreign)
    assert digests(foreign) == before
    apply_decisions(run)


def test_a_log_of_an_earlier_version_is_read_unless_it_is_of_more_rows(run, tmp_path):
    twin = make_run(tmp_path / "twin", tmp_path / "train.jsonl", SCORES)
    store.decide(run, 1, "quarantined", "", "ann")
    with closing(sqlite3.connect(run / store.FILE)) as db:
        db.execute("DROP TABLE about")
    assert apply_decisions(run).moved_by_a_person == 1
    store.decide(run, 6, "kept", "", "ann")
    for command in (apply_decisions, lambda out: Review(out, None, "ann"), lambda out: Review(twin, out, "ann")):
        with pytest.raises(UserError, match=r"review\.sqlite: it holds a decision on row 6, so it is another run's"):
            command(run)


@pytest.mark.parametrize("lost", ["missing", "new"])
def test_a_review_whose_log_is_lost_is_not_undone(run, lost):
    store.decide(run, 1, "quarantined", "", "ann")
    apply_decisions(run)
    before = digests(run)
    for file in run.glob(f"{store.FILE}*"):
        file.unlink()
    if lost == "new":
        Review(run, None, "ann")
    with pytest.raises(UserError, match=r"review\.sqlite: missing or empty, .* put the file back, or decide again"):
        apply_decisions(run)
    assert digests(run) == before
    store.decide(run, 1, "quarantined", "", "ann")
    apply_decisions(run)


def test_a_decision_on_a_row_that_is_set_aside_is_not_counted(run):
    store.decide(run, 3, "kept", "", "ann")
    store.decide(run, 1, "quarantined", "", "ann")
    apply_decisions(run)
    assert review(run)["decided"] == 1


def test_scores_of_another_run_are_refused(run):
    table = pq.read_table(run / "scores.parquet")
    pq.write_table(table.slice(1), run / "scores.parquet")
    with pytest.raises(UserError, match="not the scores of this run"):
        apply_decisions(run)
    (run / "scores.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(UserError, match=r"scores\.parquet"):
        apply_decisions(run)
