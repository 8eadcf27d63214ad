"""Explanations are computed once, on the worker's thread, and kept; and `filter`, review and `apply` fit together."""

import shutil
import sqlite3
import time
from contextlib import closing

import pytest
import yaml
from markupsafe import escape
from review.made import chat, digests, verdicts, write_jsonl

from gradshield.base.assets import ASSETS
from gradshield.base.settings import FilterSettings
from gradshield.data.requests import read_requests
from gradshield.data.run_folder import write_run
from gradshield.review import store
from gradshield.review.apply import apply_decisions
from gradshield.review.page import render_review
from gradshield.review.state import Review
from gradshield.scoring.check import AlignmentCheck
from gradshield.screen.explain import explain
from gradshield.screen.filter import run_filter


@pytest.fixture(scope="module")
def made(tiny_folder, tmp_path_factory, fitted_once):
    """A real run of the tiny model, which is made to count as aligned."""
    probes = read_requests(ASSETS / "probes.jsonl")
    always = AlignmentCheck(tuple(probes), (True,) * len(probes), ("I can't",) * len(probes), (1.0,) * len(probes), ())
    rows = [chat(f"Question {n}?", f"Answer {n * n}, 你好", source="ab"[n % 2]) for n in range(12)]
    folder = tmp_path_factory.mktemp("made")
    file = write_jsonl(folder / "train.jsonl", [*rows, chat("no answer", "")])
    settings = FilterSettings(model=tiny_folder, threshold="share", value=0.25)
    shutil.copytree(fitted_once, folder / "cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADSHIELD_CACHE", str(folder / "cache"))
        patch.setattr("gradshield.scoring.check.check_alignment", lambda *_: always)
        patch.setattr("gradshield.screen.explain.require_aligned", lambda *_: always)
        run_filter(str(file), folder / "run", settings)
        yield folder


@pytest.fixture
def run(made, tmp_path, monkeypatch):
    """A copy of it."""
    monkeypatch.setenv("GRADSHIELD_CACHE", str(made / "cache"))
    return shutil.copytree(made / "run", tmp_path / "run")


def explained(review, row):
    review.worker.ask(row)
    for _ in range(600):
        state, words = review.worker.state(row)
        if state != "waiting":
            return state, words
        time.sleep(0.05)
    raise TimeoutError


def test_a_row_is_explained_once_and_shown(run, monkeypatch):
    review = Review(run, None, "ann")
    assert review.worker.state(3) == ("none", "") and review.worker.result(3) is None
    assert explained(review, 3) == ("done", "")
    found = review.worker.result(3)
    assert 0 < sum(abs(share) for _, share in found.tokens) <= 1.001
    assert "Answer 4, 你好" in "".join(text for text, _ in found.tokens)
    assert isinstance(found.refusal, float) and set(found.anchors) == {"good", "refusal", "harmful"}
    html = render_review(review, "/", {"row": "3", "text": "1"})
    assert "same request, refused" in html and "harmful anchors, median" in html and 'class="t ' in html
    assert "They did not decide the verdict." in html and "rows per bar, at most" in html
    assert "layer " in html and all(str(escape(probe)) in html for probe, _ in found.probes)
    monkeypatch.setattr("gradshield.screen.explain.open_explainer", None)  # another server needs no model for it
    assert Review(run, None, "bob").worker.result(3) == found


def test_what_another_version_saved_is_no_explanation(run):
    review = Review(run, None, "ann")
    with closing(sqlite3.connect(run / "review-texts.sqlite")) as db, db:
        db.execute("INSERT INTO explanations VALUES (2, ?, ?)", (review.worker.key, '{"row": 2}'))
    assert review.worker.result(2) is None and review.worker.state(2) == ("none", "")


def test_what_fails_is_said_and_the_next_row_is_still_explained(run, monkeypatch):
    review = Review(run, None, "ann")
    state, words = explained(review, 13)
    assert state == "failed" and "set aside" in words
    monkeypatch.setattr("gradshield.screen.explain.explain_row", lambda *_: 1 / 0)
    state, words = explained(review, 2)
    assert state == "failed" and "ZeroDivisionError" in words
    assert "The score could not be explained: ZeroDivisionError" in render_review(review, "/", {"row": "2"})
    monkeypatch.undo()


def test_what_fails_writes_no_escape_to_the_terminal(run, monkeypatch, capsys):
    words = "\x1b]0;title\x07\x1b[2J \u202e from a row"
    monkeypatch.setattr("gradshield.screen.explain.explain_row", lambda *_: (_ for _ in ()).throw(ValueError(words)))
    monkeypatch.setattr("gradshield.screen.explain.open_explainer", lambda *_: "an explainer")
    assert explained(Review(run, None, "ann"), 2)[0] == "failed"
    said = capsys.readouterr().err
    assert "could not be explained" in said and "‹U+001B›" in said and said.replace("\n", "").isprintable()


def test_a_model_that_changed_since_is_not_used(run):
    saved = yaml.safe_load((run / "run.yaml").read_text())
    saved["model"]["fingerprint"] = "another"
    write_run(run, saved)
    state, words = explained(Review(run, None, "ann"), 1)
    assert state == "failed" and "the model's files have changed since this run" in words


def test_a_real_run_is_written_again_to_the_same_bytes_with_nothing_decided(run):
    before = digests(run)
    apply_decisions(run)
    assert digests(run) == before
    entry = store.decide(run, verdicts(run).index("kept") + 1, "quarantined", "", "ann")
    store.move_threshold(run, -1e6, "ann")
    apply_decisions(run)
    assert digests(run)["kept.jsonl"] != before["kept.jsonl"]
    explained = explain(run, entry.row)
    assert (explained.verdict, explained.threshold) == ("quarantined", -1e6)
    store.move_threshold(run, None, "ann")
    store.undo(run, entry.id, "ann")
    apply_decisions(run)
    assert digests(run) == before
