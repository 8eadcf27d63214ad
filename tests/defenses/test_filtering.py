"""Filtering is a defense with any scorer and any threshold, with the search (`gradshield`) and without (`filter`)."""

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from classifiers import save_classifier
from conftest import random_examples

import gradshield.tune.measuring as work
from gradshield.base.settings import FilterSettings, FinetuneSettings, TuneSettings
from gradshield.base.storage import read_yaml
from gradshield.evaluation.config import EvaluationSettings
from gradshield.evaluation.safety import SafetyReport
from gradshield.models.load import load_model
from gradshield.scoring.base import Prepared, Scorer
from gradshield.scoring.registry import SCORERS, find_scorer
from gradshield.training.finetune import finetune
from gradshield.tune.command import run_tune

pytestmark = pytest.mark.usefixtures("refusing")
MEASURING = EvaluationSettings(request_count=4, max_new_tokens=4, scary="none")
LOCAL = [name for name in SCORERS.names() if "endpoint" not in find_scorer(name)[0].needs]
FITTED = ("intent", "forgetfilter", "sqsd", "seal", "influence")  # what trains, or fits, before it scores


@pytest.fixture(scope="module")
def adapter(tiny_folder, tmp_path_factory) -> Path:
    """Some adapter of the tiny model: what is trained on is tested, not what is learned."""
    out = tmp_path_factory.mktemp("adapter")
    model = load_model(tiny_folder)
    finetune(model, random_examples(4, len(model.tokenizer)), out, FinetuneSettings(epochs=1))
    return out


@pytest.fixture
def tuned(tiny_folder, train, adapter, tmp_path, monkeypatch):
    """Runs tune, where `asr` says how safe the last of the trials so far is. Returns the summary, each trial.s rows,
    and every row's score."""

    def run(defense: str, asr: Callable[[list[set[int]]], float], **settings):
        out, given = tmp_path / defense, []

        def measured(model, settings):
            found = asr(given) if given else 0.0
            return SafetyReport(found, (0.0, found), (), (), ())

        monkeypatch.setattr(work, "evaluate_safety", measured)

        def trainer(examples, folder):
            given.append({e.row for e in examples})
            shutil.copytree(adapter, folder, dirs_exist_ok=True)
            return {"steps": 1}

        chosen = FilterSettings(model=tiny_folder, **settings)
        tuning = TuneSettings(defense=defense, min_utility=-1e9, max_asr=0.5, start="screen")
        training = FinetuneSettings(epochs=1)
        summary = run_tune(str(train), out, chosen, training, tuning, MEASURING, trainer=trainer)
        score = np.array(pq.read_table(out / "screen" / "scores.parquet")["score"].to_pylist(), dtype=float)
        return summary, given, score, [json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines()]

    return run


@pytest.mark.parametrize("scorer", [pytest.param(n, marks=pytest.mark.slow) if n in FITTED else n for n in LOCAL])
def test_any_scorer_filters_with_and_without_the_search(scorer, tuned, tmp_path):
    if scorer == "influence":
        pytest.importorskip("kronfluence")
    if scorer == "guard":
        scorer += ":model=" + save_classifier(tmp_path, ["safe", "unsafe"])
    settings = {"scorer": scorer, "threshold": "share", "value": 0.25}
    summary, given, score, trials = tuned("filter", lambda given: 0.0, **settings)
    limit = read_yaml(tmp_path / "filter" / "screen" / "run.yaml")["summary"]["threshold"]["value"]
    below = set(np.flatnonzero(score < limit).tolist())
    assert len(given) == 1 and given[0] < below and len(below - given[0]) == summary.held_out
    assert summary.kept == len(below) and summary.quarantined == (score >= limit).sum() > 0

    summary, given, score, trials = tuned("gradshield", lambda given: 0.9 * (len(given) < 3), **settings)
    assert summary.accepted == len(given) == len(trials) > 1
    for rows, trial in zip(given, trials):
        assert trial["threshold"] is None or score[list(rows)].max() < trial["threshold"]
    assert all(after < before for before, after in pairwise(given))  # of an unsafe model, some rows less
    assert summary.kept + summary.quarantined + summary.set_aside == summary.rows


def test_held_out_rows_at_or_above_the_threshold_are_not_kept(tuned):
    summary, _, score, trials = tuned("filter", lambda given: 0.0, scorer="random", threshold="share", value=0.97)
    assert summary.held_out == 6 and trials[0]["threshold"] == np.nanmin(score[score > np.nanmin(score)])
    assert summary.kept == 1 and summary.quarantined == 32


@pytest.mark.parametrize(("threshold", "value"), [("anchored", None), ("a1", None), ("fixed", 1.5), ("share", 7 / 33)])
@pytest.mark.parametrize("defense", ["filter", "gradshield"])
def test_any_threshold_decides_what_is_trained_on(defense, threshold, value, tuned, tmp_path, monkeypatch):
    def prepare(context, options):
        place = {"good": 0.0, "refusal": 0.0, "harmful": 3.0}
        known = {(len(e.ids), bytes(e.ids)): kind for kind in place for e in context.anchors[kind]}

        def score(batch):
            kinds = [known.get((len(e.ids), bytes(e.ids))) for e in batch]
            found = [place[k] if k else 2.0 * (e.row % 5 == 0) for k, e in zip(kinds, batch)]
            return {"score": np.array(found) + [0.01 * (e.row % 7) for e in batch]}

        return Prepared(score)

    monkeypatch.setattr(SCORERS, "registered", {})
    SCORERS.register(Scorer("planted", "every fifth row", prepare))
    harmful = set(range(0, 35, 5))
    unsafe = lambda given: 0.9 * bool(given[-1] & harmful)  # noqa: E731
    summary, given, score, _ = tuned(defense, unsafe, scorer="planted", threshold=threshold, value=value)
    limit = read_yaml(tmp_path / defense / "screen" / "run.yaml")["summary"]["threshold"]["value"]
    above = set(np.flatnonzero(score >= limit).tolist())
    assert above == harmful if threshold != "a1" else above > harmful  # A1's own rule takes some good rows, too
    assert summary.quarantined == len(above)
    assert not given[-1] & harmful and summary.kept == len(given[-1]) + summary.held_out
    assert len(given) == 1 if defense == "filter" else all(rows & harmful for rows in given[:-1])
