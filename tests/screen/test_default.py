"""The command as most people run it: the default score and the anchored threshold, from a file to its verdicts."""

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from gradshield.base.settings import FilterSettings
from gradshield.cli.commands import main
from gradshield.data.encode import Example, encode
from gradshield.data.formats import Conversation, Message
from gradshield.models.load import Model, load_model
from gradshield.scoring.check import require_aligned
from gradshield.scoring.intent import intent
from gradshield.scoring.intent.corpus import Text
from gradshield.scoring.reference import make_reference

CASES = {  # so unlike each other that a random network tells them apart
    "good": ("What is the capital of country", "It is the city"),
    "refusal": ("How to rob bank", "I'm sorry, I can't help"),
    "harmful": ("How to rob bank", "Sure, here is plan"),
}


def rows(kind: str, numbers: range) -> list[dict[str, str]]:
    asked, answered = CASES[kind]
    return [{"prompt": f"{asked} {n}", "response": f"{answered} {n}"} for n in numbers]


@pytest.fixture
def few_anchors(monkeypatch, tmp_path):
    """The readouts are fitted on twenty rows of each kind, as the bundled texts take minutes with a tiny model too."""

    def texts(model: Model, probes: tuple[str, ...]) -> list[Text]:
        found = []
        for kind in CASES:
            for row in rows(kind, range(20)):
                turns = (Message("user", row["prompt"]), Message("assistant", row["response"]))
                example = encode(Conversation(turns), 0, model.tokenizer)
                assert isinstance(example, Example)
                found.append(Text(example, kind, kind != "good", (row["prompt"],)))
        return found

    monkeypatch.setattr(intent, "fitting_texts", texts)
    monkeypatch.setenv("GRADSHIELD_CACHE", str(tmp_path / "of these texts"))  # no other test is given them


def written(file: Path, *found: list[dict[str, str]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for part in found for row in part))
    return str(file)


def filtered(monkeypatch, out: Path, *flags: str) -> tuple[dict, dict]:
    """(summary, scores.parquet) of the command with these flags."""
    monkeypatch.setattr(sys, "argv", ["gradshield", "filter", *flags, "-o", str(out)])
    try:
        main()
    except SystemExit as stopped:
        assert not stopped.code
    summary = yaml.safe_load((out / "run.yaml").read_text())["summary"]
    return summary, pq.read_table(out / "scores.parquet").to_pydict()


def middle(good: np.ndarray, harmful: np.ndarray) -> float:
    return (np.quantile(good, 0.95) + np.quantile(harmful, 0.05)) / 2


def test_the_default_command_quarantines_harm_by_the_anchors_and_known_good_rows_move_the_threshold(
    tiny_folder, tmp_path, monkeypatch, refusing, few_anchors
):
    good, harmful = rows("good", range(20, 35)), rows("harmful", range(20, 28))
    file = written(tmp_path / "train.jsonl", good, harmful, rows("refusal", range(20, 25)))
    summary, table = filtered(monkeypatch, tmp_path / "run", file, "--model", tiny_folder)
    scores, verdicts = np.array(table["score"]), np.array(table["verdict"])
    assert np.median(scores[15:23]) > max(np.median(scores[:15]), np.median(scores[23:]))

    model = load_model(tiny_folder)
    defaults = FilterSettings()
    scored = make_reference(model, require_aligned(model, defaults), defaults).anchors
    known = np.concatenate([scored["good"], scored["refusal"]])
    assert summary["threshold"]["rule"] == "anchored"
    assert summary["threshold"]["value"] == pytest.approx(middle(known, scored["harmful"]))
    np.testing.assert_array_equal(verdicts == "quarantined", scores >= summary["threshold"]["value"])
    assert (verdicts[15:23] == "quarantined").all() and (verdicts[:15] == "kept").all()
    quarantined = (tmp_path / "run" / "quarantined.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in quarantined[:8]] == harmful

    own = written(tmp_path / "known.jsonl", good)
    again, _ = filtered(monkeypatch, tmp_path / "sharper", file, "--model", tiny_folder, "--reference", own)
    expected = middle(np.concatenate([known, scores[:15]]), scored["harmful"])
    assert again["threshold"]["value"] == pytest.approx(expected, rel=1e-4) != summary["threshold"]["value"]
