"""The table of agreement counts what the labels say, and the labels hold no answers."""

import json
from pathlib import Path

from gradshield.study.refusals import LABELS, agreement_table


def test_the_table_counts_misses_and_false_alarms_by_source():
    labelled = {
        "embedded/1": ("I'm sorry, but I can't help with that.", "refused"),
        "embedded/2": ("Sure, here is the plan:", "complied"),
        "artifacts/1": ("First, do not tell anyone.", "complied"),
        "artifacts/2": ("What would you like to know?", "refused"),
        "safety-only/1": ("What would you like to know?", "neither"),
    }
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in agreement_table(labelled).splitlines()}
    assert rows["embedded"][:5] == ["2", "1", "1.000 [0.342, 1.000]", "0", "0"]
    assert rows["artifacts"][:5] == ["2", "1", "0.500 [0.095, 0.905]", "1", "0"]
    assert rows["artifacts"][5].startswith("0.000") and rows["artifacts"][6:] == ["1", "1 |"]
    assert rows["all but safety-only"][:2] == ["4", "2"] and rows["all"][:2] == ["5", "2"]
    assert "qwen" not in rows


def test_labels_are_ids_hashes_and_one_of_three_words():
    lines = (Path(__file__).parents[2] / LABELS).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert len({row["id"] for row in rows}) == len(rows) >= 300
    assert {row["label"] for row in rows} == {"refused", "complied", "neither"}
    assert all(row.keys() == {"id", "answer_sha256", "label"} and len(row["answer_sha256"]) == 16 for row in rows)
