"""Rows that are easily read otherwise than a trainer does, through the command line: each is scored as the plain row
that TRL trains on, or set aside with the reason. `random` gives equal scores to equal tokens with equal masks alone."""

import json
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from gradshield.cli import main

pytestmark = pytest.mark.usefixtures("refusing")
CASES = Path(__file__).parents[1] / "data" / "cases"


def turns(row):
    return {"messages": [{k: v for k, v in turn.items() if k != "weight"} for turn in row["messages"]]}


def joined(row):
    return {"messages": [*row["prompt"], *row["completion"]]}


def chosen(row):
    return {"messages": [*row["messages"], row["chosen"]]}


def shown(row):
    """Lists of parts as the template of the tests' tokenizer puts them into its text."""
    return {"messages": [turn | {"content": str(turn["content"])} for turn in row["messages"]]}


BESIDE = "with other content"
EXPECTED = {  # for each row: what makes the plain row of it, or a part of the reason to set it aside
    "weight-0.jsonl": [turns, turns, turns, turns],
    "messages-and-chosen.jsonl": [chosen, chosen, "messages ends with an answer, and chosen has a different one"],
    "prompt-turns-trained.jsonl": [None, None, joined],  # an answer in a prompt is not trained on: no plain row is so
    "content-parts.jsonl": [shown],
    "images-column.jsonl": ["images beside messages: only text can be scored", turns],
    "system-column.jsonl": [turns, turns],
    "functions-column.jsonl": ["turn 2 (assistant) has a function_call"],
    "prompt-completion-messages.jsonl": [f"messages beside prompt_completion, {BESIDE}"],
    "conversations-messages.jsonl": [f"messages beside sharegpt, {BESIDE}"],
}


def test_every_case_has_its_row_here():
    assert {file.name for file in CASES.iterdir()} == EXPECTED.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_each_row_is_scored_as_its_plain_row_or_set_aside(monkeypatch, capsys, tmp_path, tiny_folder, name):
    def filtered(file):
        out = tmp_path / f"run-{file.stem}"
        words = ("--model", tiny_folder, "--scorer", "random", "--threshold", "share", "--value", "0.5")
        monkeypatch.setattr(sys, "argv", ["gradshield", "filter", str(file), "-o", str(out), *words])
        with pytest.raises(SystemExit) as stopped:
            main()
        return stopped.value.code, pq.read_table(out / "scores.parquet").to_pylist() if out.exists() else []

    expected = EXPECTED[name]
    rows = [json.loads(line) for line in (CASES / name).read_text().splitlines()]
    code, scored = filtered(CASES / name)
    if not any(callable(each) for each in expected):  # nothing is left to be scored
        assert code == 2 and not scored and expected[0] in capsys.readouterr().err
        return
    assert code == 0 and len(scored) == len(rows) == len(expected)
    plain = tmp_path / "plain.jsonl"
    plain.write_text(
        "".join(
            json.dumps((each if callable(each) else joined)(row)) + "\n"
            for each, row in zip(expected, rows)
            if not isinstance(each, str)
        )
    )
    others = iter(filtered(plain)[1])
    for each, row in zip(expected, scored):
        if isinstance(each, str):
            assert row["verdict"] == "set aside" and each in row["reason"]
            continue
        other = next(others)
        assert (row["tokens"], row["reason"]) == (other["tokens"], None)
        assert (row["score"] == other["score"]) == callable(each)
