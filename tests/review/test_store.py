"""The log of decisions only grows; the latest entry that stands wins, and every one can be taken back."""

import csv
import io
import json
import math
import os
import re
import signal
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from random import Random

import pytest

from gradshield.base.errors import UserError
from gradshield.review import store


def verdicts(out) -> dict[int, str]:
    return {row: decision.verdict for row, decision in store.decisions_in_force(out).items()}


def test_the_latest_decision_wins_and_taking_it_back_restores_the_one_before(tmp_path):
    first = store.decide(tmp_path, 3, "kept", "read it", "ann")
    second = store.decide(tmp_path, 3, "quarantined", "", "bob")
    assert verdicts(tmp_path) == {3: "quarantined"}
    assert store.undo(tmp_path, second.id, "bob") == second
    assert store.decisions_in_force(tmp_path)[3] == first
    store.undo(tmp_path, first.id, "bob")
    assert verdicts(tmp_path) == {}
    assert [(e.id, t is not None) for e, t in store.history(tmp_path, 3)] == [(second.id, True), (first.id, True)]


def test_a_verdict_without_a_note_keeps_the_one_that_stands(tmp_path):
    store.decide(tmp_path, 3, "kept", "read it", "ann")
    assert store.decide(tmp_path, 3, "quarantined", None, "bob").note == "read it"
    assert (
        store.decide(tmp_path, 3, "kept", "", "bob").note == "" == store.decide(tmp_path, 4, "kept", None, "bob").note
    )


def test_any_decision_can_be_taken_back_not_only_the_latest(tmp_path):
    first = store.decide(tmp_path, 1, "kept", "", "ann")
    store.decide(tmp_path, 1, "quarantined", "", "ann")
    store.undo(tmp_path, first.id, "ann")
    assert verdicts(tmp_path) == {1: "quarantined"}


def test_undecided_is_a_decision_that_leaves_the_row_to_its_score(tmp_path):
    store.decide(tmp_path, 1, "kept", "", "ann")
    cleared = store.decide(tmp_path, 1, "undecided", "", "ann")
    assert verdicts(tmp_path) == {}
    store.undo(tmp_path, cleared.id, "ann")
    assert verdicts(tmp_path) == {1: "kept"}


def test_without_a_number_the_latest_that_stands_is_taken_back(tmp_path):
    assert store.undo(tmp_path, None, "ann") is None
    for row in (1, 2, 3):
        store.decide(tmp_path, row, "kept", "", "ann")
    assert [store.undo(tmp_path, None, "ann").row for _ in range(3)] == [3, 2, 1]
    assert store.undo(tmp_path, None, "ann") is None


def test_the_threshold_is_an_entry_like_any_other(tmp_path):
    store.move_threshold(tmp_path, 1.5, "ann")
    none = store.move_threshold(tmp_path, math.inf, "ann")
    assert store.decisions_in_force(tmp_path)[0].value == math.inf
    store.undo(tmp_path, none.id, "ann")
    assert store.decisions_in_force(tmp_path)[0].value == 1.5
    store.move_threshold(tmp_path, None, "ann")
    assert store.decisions_in_force(tmp_path) == {}
    with pytest.raises(UserError):
        store.move_threshold(tmp_path, math.nan, "ann")


def test_no_entry_can_be_changed_or_removed(tmp_path):
    store.decide(tmp_path, 1, "kept", "", "ann")
    with sqlite3.connect(tmp_path / store.FILE) as db:
        for order in ("UPDATE log SET verdict = 'quarantined'", "DELETE FROM log"):
            with pytest.raises(sqlite3.IntegrityError, match="only grows"):
                db.execute(order)
    assert verdicts(tmp_path) == {1: "kept"}


def test_many_deciding_at_once_lose_nothing(tmp_path):
    def work(person: int) -> None:
        for row in range(1, 11):
            store.decide(tmp_path, row, "kept" if person % 2 else "quarantined", str(person), f"person {person}")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    log = json.loads(store.export_json(tmp_path))["log"]
    assert len(log) == 80 == store.version(tmp_path) and [e["id"] for e in log] == list(range(1, 81))
    last = {e["row"]: e["verdict"] for e in log}
    assert verdicts(tmp_path) == last


def test_the_same_entry_is_taken_back_once_whoever_asks(tmp_path):
    entry = store.decide(tmp_path, 1, "kept", "", "ann")
    with ThreadPoolExecutor(8) as pool:
        taken = list(pool.map(lambda _: store.undo(tmp_path, entry.id, "ann"), range(8)))
    assert sum(t is not None for t in taken) == 1 and store.version(tmp_path) == 2


def test_what_was_decided_before_a_kill_is_there_after_it(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path; from gradshield.review import store\n"
        "store.decide(Path(sys.argv[1]), 7, 'kept', '', 'ann')\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=os.environ)
    assert done.returncode == -signal.SIGKILL
    assert verdicts(tmp_path) == {7: "kept"}
    store.decide(tmp_path, 8, "quarantined", "", "ann")
    assert verdicts(tmp_path) == {7: "kept", 8: "quarantined"}


FORMULAS = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r\n=cmd|' /C calc'!A0", "=HYPERLINK(1)", "＝1+1", "\u200b=1"]
FORMULAS += [
    "a;=1",
    "a; +1",
    'a;"=1+1"',
    "a\t@SUM(A1)",
    "a\t\t=1",
    "a\n=1",
    "a\r=1",
    "a\u2028=1",
    "a;\u00a0-1",
    "a,=1",
    '"=1',
]


@pytest.mark.parametrize("text", FORMULAS)
def test_no_exported_cell_is_a_formula_whatever_is_taken_as_the_end_of_a_cell(tmp_path, text):
    store.decide(tmp_path, 1, "kept", text, text)
    table = store.export_csv(tmp_path, [text + ":1"])
    rows = list(csv.reader(io.StringIO(table)))
    assert len(rows) == 2 and len(rows[1]) == 7
    for delimiter in ",;\t":
        cells = [cell for row in csv.reader(io.StringIO(table, newline=""), delimiter=delimiter) for cell in row]
        assert not [cell for cell in cells if re.match(r"\s*[=+\-@＝]", cell)], delimiter


def test_exports_hold_no_control_characters_and_the_whole_log(tmp_path):
    entry = store.decide(tmp_path, 1, "kept", "\x1b[31mred \u202e \ud800", "ann")
    store.undo(tmp_path, entry.id, "bob")
    store.decide(tmp_path, 2, "quarantined", "bad", "ann")
    store.move_threshold(tmp_path, math.inf, "ann")
    text, table = store.export_json(tmp_path), store.export_csv(tmp_path, ["a:1", "a:2"])
    assert text.isascii() and "\x1b" not in text and "\x1b" not in table and "\u202e" not in table
    found = json.loads(text)
    assert len(found["log"]) == 4 and [e["row"] for e in found["standing"]] == [0, 2]
    assert "quarantined" in table and "inf" in table and "red" not in table


def test_the_decisions_in_force_are_the_same_read_at_once_or_as_they_come(tmp_path):
    random = Random(0)
    seen, standing = 0, {}
    for _ in range(60):
        for _ in range(random.randrange(3)):
            row, verdict = random.randrange(1, 6), random.choice(store.CHOICES)
            store.decide(tmp_path, row, verdict, random.choice(["", None]), "ann")
        random.choice([lambda: store.move_threshold(tmp_path, random.choice([None, 1.0]), "ann"), lambda: None])()
        store.undo(tmp_path, random.randrange(1, 40), "bob")
        seen, standing = store.changed_since(tmp_path, seen, standing)
        assert standing == store.decisions_in_force(tmp_path) and seen == store.version(tmp_path)


def test_a_log_that_takes_another_s_place_is_read_from_its_start(tmp_path):
    for row in (1, 2, 3):
        store.decide(tmp_path, row, "kept", "", "ann")
    seen, standing = store.changed_since(tmp_path, 0, {})
    for file in tmp_path.glob(f"{store.FILE}*"):
        file.unlink()
    assert store.changed_since(tmp_path, seen, standing) == (0, {})
    store.decide(tmp_path, 9, "kept", "", "ann")
    assert [*store.changed_since(tmp_path, seen, standing)[1]] == [9]


def test_one_more_decision_costs_little_whatever_was_decided_before(tmp_path):
    store.decide_all(tmp_path, range(1, 50_001), "kept", "ann", 0)
    seen, standing = store.changed_since(tmp_path, 0, {})
    steps = 0

    def count() -> int:
        nonlocal steps
        steps += 1
        return 0

    real = sqlite3.connect

    def counted(*given, **named):
        db = real(*given, **named)
        db.set_progress_handler(count, 100)
        return db

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store.sqlite3, "connect", counted)
        store.decide(tmp_path, 7, "quarantined", None, "ann")
        seen, standing = store.changed_since(tmp_path, seen, standing)
        store.history(tmp_path, 7)
    assert len(standing) == 50_000 and standing[7].verdict == "quarantined" and steps < 30


def test_a_kill_while_the_log_is_made_leaves_none(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            store.decide(tmp_path, 1, "kept", "", "ann")
    (tmp_path / f".{store.FILE}").write_bytes(b"half")
    assert store.decisions_in_force(tmp_path) == {} and store.version(tmp_path) == 0
    store.decide(tmp_path, 1, "kept", "", "ann")
    assert [path.name for path in tmp_path.iterdir()] == [store.FILE]


@pytest.mark.parametrize("content", ["nothing", "no table"])
def test_a_log_that_is_empty_or_cut_off_is_not_one_without_decisions(tmp_path, content):
    (tmp_path / store.FILE).touch()
    if content == "no table":  # what is left of a new log where the file beside it was not copied
        with closing(sqlite3.connect(tmp_path / store.FILE)) as db:
            db.execute("PRAGMA journal_mode = WAL")
    for what in (lambda: store.decide(tmp_path, 1, "kept", "", "ann"), lambda: store.decisions_in_force(tmp_path)):
        with pytest.raises(UserError, match=r"review\.sqlite: can't be used .* put back a copy"):
            what()


def test_what_is_no_log_is_one_line(tmp_path):
    (tmp_path / store.FILE).write_text("not a database, though long enough to be looked at " * 50)
    with pytest.raises(UserError, match=store.FILE):
        store.decide(tmp_path, 1, "kept", "", "ann")
    with pytest.raises(UserError, match="one of kept"):
        store.decide(tmp_path, 1, "thrown away", "", "ann")
