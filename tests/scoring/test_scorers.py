"""Every registered scorer: no influence of batch, order, restart, duplicates or worker. A new one is tested by being
registered. And the contract itself: rows set aside with a reason, what is fitted on the whole file, wrong options."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from classifiers import save_classifier

from gradshield.base.assets import ASSETS
from gradshield.base.errors import UserError
from gradshield.base.settings import FilterSettings
from gradshield.data.encode import Example
from gradshield.data.requests import read_requests
from gradshield.scoring import base
from gradshield.scoring.anchors import encode_anchor
from gradshield.scoring.base import Prepared, Scorer, Scores
from gradshield.scoring.check import AlignmentCheck
from gradshield.scoring.engine import fit_to_memory, from_json, score
from gradshield.scoring.ray import _blocks, _Worker
from gradshield.scoring.reference import key_of, make_reference
from gradshield.scoring.registry import SCORERS, find_scorer
from gradshield.screen.explain import explain
from gradshield.screen.filter import run_filter

FORMS = ["normalise=cosine", "normalise=module", "s=own", "contrast=minus", "contrast=orthogonal", "weights=lora"]
FORMS += ["mapping=sign", "weights=all", "tokens=4"]
SPECS = [*SCORERS.names(), *(f"fihs:probes=2,{form}" for form in FORMS)]
SPECS = [spec for spec in SPECS if "endpoint" not in find_scorer(spec)[0].needs]
PROBES = tuple(read_requests(ASSETS / "probes.jsonl")[:4])
CHECK = AlignmentCheck(PROBES, (True,) * 4, ("No",) * 4, (1.0,) * 4, ())


def conversations(model) -> list[Example]:
    """Twelve rows of many lengths, with their text."""
    said = ["Sure", "I can't help with that.", "Mix flour and water. " * 3, "No.", "Yes, of course! " * 6]
    rows = ({"prompt": f"Question {n} " * (1 + n % 4), "response": said[n % 5] + f" {n}"} for n in range(12))
    found = [encode_anchor(model, row, n) for n, row in enumerate(rows)]
    return [e for e in found if isinstance(e, Example)]


@pytest.fixture(scope="module", params=SPECS)
def prepared(request, tiny, tmp_path_factory):
    """(spec, its cache folder, rows, the scorer ready for them)."""
    folder, spec = str(tmp_path_factory.mktemp("cache")), request.param
    if spec == "guard":
        spec += ":model=" + save_classifier(tmp_path_factory.mktemp("guard"), ["safe", "unsafe"])
    if spec == "influence":
        pytest.importorskip("kronfluence")
    rows = conversations(tiny)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADSHIELD_CACHE", folder)
        if "s=own" in request.param:  # a random model has no tokens of its own
            patch.setattr("gradshield.scoring.fihs.fihs.own_tokens", lambda *_: ([5], [9]))
        reference = make_reference(tiny, CHECK, FilterSettings(scorer=spec, threshold="fixed"), rows)
    assert not list(Path(folder).glob("*.parts"))  # what was kept on the way is gone
    return spec, folder, reference.scored_part(rows), reference.scorer


def close(found, wanted):
    for name, values in wanted.columns.items():
        values = np.where([n in wanted.reasons for n in range(len(values))], np.nan, values)  # as `score` has them
        scale = np.nanmax(np.abs(values), initial=1e-9)
        np.testing.assert_allclose(found[name], values, rtol=2e-3, atol=1e-3 * scale, err_msg=name)


def test_scores_depend_neither_on_the_batch_nor_on_the_order(prepared):
    _, _, rows, scorer = prepared
    whole = fit_to_memory(scorer)(rows)
    assert np.isfinite(whole["score"]).sum() + len(whole.reasons) >= len(rows) and len(whole["score"]) == len(rows)
    close(score(rows, scorer, batch_tokens=1), whole)
    order = np.random.default_rng(1).permutation(len(rows))
    again = fit_to_memory(scorer)([rows[n] for n in order])
    ordered = {name: values[np.argsort(order)] for name, values in again.columns.items()}
    assert {order[n]: why for n, why in again.reasons.items()} == whole.reasons
    for values in ordered.values():
        values[list(whole.reasons)] = np.nan
    close(Scores(ordered), whole)


def test_fihs_of_the_first_tokens_ignores_those_behind_them(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADSHIELD_CACHE", str(tmp_path))
    rows = [{"prompt": "A question", "response": f"Sure, here it is: {end}"} for end in ("yes", "no")]
    rows = [encode_anchor(tiny, row, n) for n, row in enumerate(rows)]
    examples = [e for e in rows if isinstance(e, Example)]
    found = {}
    for spec in ("fihs:probes=2", "fihs:probes=2,tokens=3"):
        scorer = make_reference(tiny, CHECK, FilterSettings(scorer=spec, threshold="fixed"), examples).scorer
        found[spec] = scorer(examples)["score"]
    whole, short = found.values()
    assert whole[0] != pytest.approx(whole[1], rel=1e-3)
    assert short[0] == pytest.approx(short[1], rel=1e-4) and short[0] != pytest.approx(whole[0], rel=1e-3)


def test_equal_rows_are_scored_once_and_equally(prepared):
    _, _, rows, scorer = prepared
    seen: list[Example] = []
    twice = score([*rows, *rows], lambda batch: seen.extend(batch) or scorer(batch), batch_tokens=400)
    assert len(seen) == len(rows)
    np.testing.assert_array_equal(twice["score"][: len(rows)], twice["score"][len(rows) :])


def test_a_killed_run_ends_with_the_same_numbers(prepared, tmp_path):
    _, _, rows, scorer = prepared
    wanted, calls = score(rows, scorer, batch_tokens=300), []

    def dying(batch):
        calls.append(batch)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return scorer(batch)

    with pytest.raises(KeyboardInterrupt):
        score(rows, dying, batch_tokens=300, journal=tmp_path / "journal")
    again = score(rows, scorer, batch_tokens=300, journal=tmp_path / "journal")
    for name, values in wanted.columns.items():
        np.testing.assert_array_equal(again[name], values)


def test_the_columns_are_those_that_it_declares(prepared):
    spec, _, rows, scorer = prepared
    assert set(fit_to_memory(scorer)(rows).columns) - {"score"} <= set(find_scorer(spec)[0].columns)


def test_a_worker_has_what_was_fitted_and_gives_the_same_scores(prepared, tiny, monkeypatch):
    spec, folder, rows, scorer = prepared
    if "s=own" in spec:
        monkeypatch.setattr("gradshield.scoring.fihs.fihs.own_tokens", lambda *_: ([5], [9]))
    files = {file.name: file.read_bytes() for file in Path(folder).iterdir()}
    real = base.cached_arrays

    def only_read(what, model, of, make):
        return real(what, model, of, lambda: pytest.fail(f"{what} was fitted again"))

    monkeypatch.setattr(base, "cached_arrays", only_read)
    settings = FilterSettings(scorer=spec, threshold="fixed")

    def build():
        return make_reference(tiny, CHECK, settings, None, key_of(conversations(tiny))).scorer

    [block] = _blocks([(0, rows)])
    [said] = _Worker(build, files, None)(block)["columns"].to_pylist()
    wanted = fit_to_memory(scorer)(rows)
    for name, values in from_json(json.loads(said)).columns.items():
        np.testing.assert_allclose(values, wanted[name], rtol=1e-6, atol=1e-9 * np.abs(wanted[name]).max())


@pytest.fixture
def tiny_run(tmp_path, tiny_folder, monkeypatch):
    """Filters six rows, two of them alike, with a scorer and returns the run's folder."""
    monkeypatch.setattr("gradshield.scoring.check.check_alignment", lambda *_: CHECK)
    monkeypatch.setattr("gradshield.screen.explain.require_aligned", lambda *_: CHECK)
    monkeypatch.setattr(SCORERS, "registered", {})
    file = tmp_path / "train.jsonl"
    rows = [{"prompt": f"Question {n}", "response": "word " * n} for n in (1, 2, 3, 4, 5, 5)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(scorer: Scorer, options: str = "", **more) -> Path:
        SCORERS.register(scorer)
        settings = {"threshold": "share", "value": 0.5, "model": tiny_folder, **more}
        run_filter(str(file), tmp_path / "run", FilterSettings(scorer=scorer.name + options, **settings))
        return tmp_path / "run"

    return run


def test_a_scorer_sets_a_row_aside_with_its_own_reason(tiny_run):
    def prepare(context, options):
        def score(batch):
            length = np.array([len(e.conversation.messages[-1].content) for e in batch], dtype=float)
            return Scores({"score": length}, {n: "too short to tell" for n in np.flatnonzero(length < 7).tolist()})

        return Prepared(score)

    out = tiny_run(Scorer("length", "length of the text", prepare, needs=frozenset({"text"})))
    table = pq.read_table(out / "scores.parquet").to_pydict()
    assert table["reason"] == ["too short to tell", *[None] * 5]
    assert table["verdict"][0] == "set aside" and np.isnan(table["score"][0])
    assert table["score"][1:] == [10, 15, 20, 25, 25]
    with pytest.raises(UserError, match="row 1 was set aside: too short to tell"):
        explain(out, 1)
    assert explain(out, 3).score == 15


def test_what_is_fitted_on_the_whole_file_outlives_the_run(tiny_run):
    fits = []

    def prepare(context, options):
        def fit():
            fits.append(1)
            return {"mean": np.array(np.mean([len(e.ids) for e in context.examples]))}

        mean = float(context.cached("mean", fit)["mean"])
        return Prepared(lambda batch: {"score": np.array([len(e.ids) - mean for e in batch])})

    out = tiny_run(Scorer("above", "longer than the file's mean", prepare, needs=frozenset({"whole file"})))
    table = pq.read_table(out / "scores.parquet").to_pydict()
    assert sum(table["score"]) == pytest.approx(0) and explain(out, 2).score == table["score"][1] and fits == [1]


def test_a_need_must_be_declared(tiny_run):
    def prepare(context, options):
        return Prepared(lambda batch: {"score": np.array([len(context.examples)] * len(batch), dtype=float)})

    with pytest.raises(TypeError, match="'whole file' without declaring"):
        tiny_run(Scorer("sloppy", "asks for what it does not declare", prepare))


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("fish", "--scorer fish: no such scorer; there are intent, fihs"),
        ("fihs:normalize=module", "no option 'normalize'; it has normalise, s,"),
        ("fihs:probes=none", "probes=none: must be a whole number"),
        ("fihs:module", "'module' is not key=value"),
    ],
)
def test_a_wrong_scorer_or_option_is_said_in_one_line(spec, said):
    with pytest.raises(UserError, match=re.escape(said)) as error:
        find_scorer(spec)
    assert "\n" not in str(error.value)


def test_the_scorer_of_the_documentation_runs(tiny_run, tiny_folder, tmp_path):
    text = Path("docs/architecture.md").read_text(encoding="utf-8")
    section = text.split("## Add a scorer")[1]
    code = section.split("```python\n")[1].split("```")[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 30
    scope: dict = {}
    exec(compile(code, os.fspath("docs/architecture.md"), "exec"), scope)
    out = tiny_run(scope["SCORER"], ":floor=2", threshold="share")
    table = pq.read_table(out / "scores.parquet").to_pydict()
    assert "fewer than 8 response tokens" in table["reason"] and np.isfinite(table["score"][1:]).all()
    own = section.split("```python\n")[2].split("```")[0]  # registered in the user's own code
    for name, here in (("train.jsonl", tmp_path / "train.jsonl"), ("MODEL", tiny_folder), ("run", tmp_path / "own")):
        own = own.replace(f'"{name}"', repr(str(here)))
    SCORERS.registered.clear()
    exec(own.replace("scorer=", 'threshold="share", value=0.5, scorer='), scope)
    assert pq.read_table(tmp_path / "own" / "scores.parquet")["score"].to_pylist() == pytest.approx(
        table["score"], nan_ok=True
    )
