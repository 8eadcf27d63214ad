"""Any row's text is found, whole and by search, whatever is in it; the file of texts follows from the input alone."""

import json

import pytest
from report.made import PAYLOADS
from review.made import chat, make_run, write_jsonl

from gradshield.base.errors import UserError
from gradshield.data import open_source, read_rows
from gradshield.data.formats import Conversation, Message
from gradshield.data.run_folder import read_run
from gradshield.review import texts
from gradshield.review.near_duplicates import Likeness

BIG = "<b>word</b> " * 90_000 + "needle"  # a megabyte


@pytest.fixture
def run(tmp_path):
    records = [chat(payload, "answer " + payload) for payload in PAYLOADS if payload]
    records += [chat("Größe STRASSE ẞ", "x"), chat(BIG, "short"), '{"messages": "half', "\udcff\udcfe{"]
    file = write_jsonl(tmp_path / "train.jsonl", records)
    usable = sum(row.problem is None for row in read_rows(open_source(file)))
    out = make_run(tmp_path / "run", file, [float(n) for n in range(usable)])
    texts.open_texts(out, read_run(out))
    return out


def rows(out):
    return list(read_rows(open_source(read_run(out).input.path)))


def found(out, words):
    return [n + 1 for n in texts.search_rows(out, words, len(rows(out))).nonzero()[0]]


def test_every_row_comes_back_as_it_was_read(run):
    for row in rows(run):
        again = texts.row_of(run, row.index + 1)
        assert again is not None
        assert (again.index, again.source, again.line, again.record) == (row.index, row.source, row.line, row.record)
        assert bool(again.problem) == bool(row.problem)
    assert texts.row_of(run, len(rows(run)) + 1) is None


def test_what_is_nested_deeper_than_can_be_written_does_not_stop_the_rest():
    deep: list = []
    for _ in range(3000):
        deep = [deep]
    turn = Message("user", "q", extra={"x": deep})
    assert texts.shown_turns(Conversation((turn,)))[1] == ("user, more", "nested too deeply to be shown")


def test_search_finds_every_text_whatever_the_case_and_wherever_it_stands(run):
    for number, payload in enumerate((p for p in PAYLOADS if p), 1):
        if rows(run)[number - 1].problem is None:  # such a one is shown, and searched, as it stands in the file
            assert number in found(run, payload[:200]), payload[:50]
    number = len([p for p in PAYLOADS if p]) + 1
    assert found(run, "strasse") == found(run, "GRÖSSE STRASSE SS") == [number]
    assert found(run, "NEEDLE") == [number + 1] and found(run, "half") == [number + 2]
    assert found(run, f"train.jsonl:{number}") == [number] and found(run, "% _ nowhere") == []


def test_a_record_without_a_conversation_is_found_by_its_own_letters(tmp_path):
    records = [chat("a", "b"), '{"messages": [], "why": "\u4f60好世界"}']
    out = make_run(tmp_path / "run", write_jsonl(tmp_path / "train.jsonl", records), [0.0])
    texts.open_texts(out, read_run(out))
    assert found(out, "你好") == [2]


def test_openings_are_short_and_lengths_are_whole(run):
    number = len([p for p in PAYLOADS if p]) + 2
    (request, answer, length) = texts.openings(run, [number])[number]
    assert request == BIG[: texts.OPENING] and answer == "short" and length == len(BIG) + len("\nshort")
    assert len(list(texts.all_texts(run, 50))) == len(rows(run))
    assert all(len(text) <= 50 and not text.startswith("train.jsonl:") for text in texts.all_texts(run, 50))


def test_the_texts_are_made_once_and_anew_when_they_are_not_whole(run, tmp_path):
    (tmp_path / "train.jsonl").unlink()
    texts.open_texts(run, read_run(run))  # the input is not needed any more
    (run / texts.FILE).write_bytes((run / texts.FILE).read_bytes()[:5000])
    with pytest.raises(UserError, match=r"train\.jsonl"):
        texts.open_texts(run, read_run(run))
    write_jsonl(tmp_path / "train.jsonl", [chat("another", "file")])
    with pytest.raises(UserError, match="checksum"):
        texts.open_texts(run, read_run(run))


def test_a_kill_while_the_texts_are_made_leaves_nothing_that_counts(run, monkeypatch):
    (run / texts.FILE).unlink()
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            texts.open_texts(run, read_run(run))
    assert not (run / texts.FILE).exists()
    texts.open_texts(run, read_run(run))
    assert texts.row_of(run, 1) is not None


def test_what_a_turn_holds_beside_its_text_is_shown_too(tmp_path):
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "é"}}}
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    file = write_jsonl(tmp_path / "f.jsonl", [{"messages": turns, "tools": [{"name": "look"}]}])
    out = make_run(tmp_path / "run", file, [0.0])
    texts.open_texts(out, read_run(out))
    said = texts.shown_turns(texts.to_conversation(texts.row_of(out, 1).record, "messages"))
    assert [role for role, _ in said] == ["tools", "user", "assistant, more"]
    assert json.loads(said[2][1])["tool_calls"][0]["function"]["arguments"] == {"at": "é"}
    assert found(out, '"name": "look"') == [1]


def test_near_duplicates_are_the_rows_that_share_most_words(tmp_path):
    said = [
        "Please tell me how to plant tomatoes in a small garden this spring",
        "Please tell me how to plant tomatoes in a small garden this autumn",
        "Write a poem about the sea and the wind that comes from it",
        "请 告诉 我 如何 种植 番茄",
        "请告诉我如何种植番茄吗",
        "请告诉我如何种植番茄",
        "",
    ]
    file = write_jsonl(tmp_path / "f.jsonl", [chat(text or "?", "ok") for text in said])
    out = make_run(tmp_path / "run", file, [0.0] * len(said))
    texts.open_texts(out, read_run(out))
    likeness = Likeness(out)
    assert [row for row, _ in likeness.nearest(1)] == [2] and likeness.nearest(3) == []
    assert {row for row, _ in likeness.nearest(6)} == {4, 5}
    assert all(0.5 <= cosine <= 1.0001 for _, cosine in likeness.nearest(1))
