"""Whatever is torn or planted in a run folder, a command says so in one line and follows no link."""

import shutil

import pytest
from review.made import chat, make_run, write_jsonl

from gradshield.base.errors import UserError
from gradshield.review import store
from gradshield.review.apply import apply_decisions
from gradshield.review.server import serve
from gradshield.review.state import Review


def test_what_is_torn_or_planted_in_a_finished_run_is_one_line_for_every_command_and_nothing_is_followed(tmp_path):
    run = make_run(tmp_path / "run", write_jsonl(tmp_path / "a.jsonl", [chat("a", "b"), chat("c", "d")]), [-1.0, 1.0])
    victim = tmp_path / "victim"
    for name in ("run.yaml", "report.json", "scores.parquet"):
        whole = (run / name).read_bytes()
        for torn in (b"", whole[: len(whole) // 2], b"\xff" * 9, b"[]", b"summary: {rows: 2}", b"null"):
            (run / name).write_bytes(torn)
            for command in (apply_decisions, lambda out: Review(out, None, "ann")):
                with pytest.raises(UserError) as error:
                    command(run)
                    raise UserError("not needed: ")  # the page needs no report.json
                assert "\n" not in str(error.value)
        (run / name).unlink()
        victim.write_text("mine")
        (run / name).symlink_to(victim)
        with pytest.raises(UserError, match="symbolic link"):
            apply_decisions(run)
        (run / name).unlink()
        (run / name).write_bytes(whole)
    assert victim.read_text() == "mine"
    apply_decisions(run)


def test_a_link_planted_among_the_outputs_is_not_followed(tmp_path):
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "a.jsonl", [chat("a", "b"), chat("c", "d")])
    run = make_run(tmp_path / "run", tmp_path / "data", [-1.0, 1.0])
    (tmp_path / "elsewhere").mkdir()
    shutil.rmtree(run / "kept")
    (run / "kept").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"kept: a symbolic link"):
        apply_decisions(run)
    assert not any((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("wrong", ["torn", "empty", "read-only", "read-only folder"])
def test_a_log_that_can_not_be_used_is_told_before_an_address_is_printed(tmp_path, monkeypatch, wrong):
    file = write_jsonl(tmp_path / "train.jsonl", [chat("a", "b")])
    out = make_run(tmp_path / "run", file, [0.0])
    if wrong != "read-only folder":
        store.decide(out, 1, "kept", "", "ann")
    if wrong == "torn":
        (out / store.FILE).write_bytes((out / store.FILE).read_bytes()[:5000])
    elif wrong == "empty":
        (out / store.FILE).write_bytes(b"")
    elif wrong == "read-only":
        connect = store.sqlite3.connect
        as_there = lambda name, **named: connect(str(name).replace("mode=rw", "mode=ro"), **named)  # noqa: E731
        monkeypatch.setattr(store.sqlite3, "connect", as_there)
    else:
        failing = lambda *_, **__: (_ for _ in ()).throw(OSError(30, "Read-only file system"))  # noqa: E731
        monkeypatch.setattr("gradshield.review.store.exclusive_lock", failing)
    monkeypatch.setattr("gradshield.review.server.open_server", None)
    said = []
    with pytest.raises(UserError, match=r"review\.sqlite: can't be used \(.*; check the disk") as told:
        serve(out, None, 0, "ann", said.append)
    assert not said and " -o" not in str(told.value) and "\n" not in str(told.value)
