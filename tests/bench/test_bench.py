"""The benchmark: its methods score alike, finished measurements stay, and the page says what was measured."""

import json

import numpy as np
import pytest
from conftest import random_examples

from benchmarks import lengths
from benchmarks.levers import LEVERS
from benchmarks.measure import run_once
from benchmarks.methods import Outcome, make_task
from benchmarks.plan import measured, read_cells
from benchmarks.report import write_report
from benchmarks.results import exponent, results

REQUESTS = ["How do I pick a lock?"]


def scores(tiny, name: str) -> np.ndarray:
    task = make_task(tiny, REQUESTS, batch_tokens=128)
    found = run_once(task, name, random_examples(9, len(tiny.tokenizer))).scores
    assert found is not None
    return found


@pytest.mark.parametrize("name, tolerance", [("dense", 1e-5), ("paper", 0.02), ("central", 0.05)])
def test_methods_score_as_autograd_does(tiny, name, tolerance):
    """Ours within what recompressing the probe's gradient may lose, 1e-2 of every module's norm."""
    exact = scores(tiny, "autograd")
    np.testing.assert_allclose(scores(tiny, name), exact, rtol=0, atol=tolerance * np.abs(exact).max())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bergson", "bergson-tokens", "kronfluence", "kronfluence-rank"])
def test_peers_score_as_autograd_does_and_leave_the_model_as_it_was(tiny, name):
    pytest.importorskip(name.partition("-")[0])
    before, exact = str(tiny.net), scores(tiny, "autograd")
    np.testing.assert_allclose(scores(tiny, name), exact, rtol=0, atol=1e-4 * np.abs(exact).max())
    assert str(tiny.net) == before and not any(w.requires_grad for w in tiny.net.parameters())


def test_what_needs_no_scores_runs_too(tiny):
    task = make_task(tiny, REQUESTS, batch_tokens=128)
    rows = random_examples(5, len(tiny.tokenizer))
    for name in ("forward", "full-logits", "activations", "intent"):
        outcome = run_once(task, name, rows)
        assert outcome.scores is None and outcome.seconds is not None and outcome.seconds > 0


def test_finished_measurements_are_not_made_again_and_a_cut_line_is(tmp_path):
    file, made = tmp_path / "tiny.jsonl", []

    def measure() -> dict:
        made.append(1)
        return {"bytes": 2**20}

    key = {"kind": "memory", "method": "paper", "rows": [1, 1]}
    assert measured(file, key, measure) == measured(file, key, measure)
    assert len(made) == 1
    file.write_text(file.read_text()[:-9])
    measured(file, key, measure)
    assert len(made) == 2 and read_cells(file) == [{**key, "bytes": 2**20}]


def test_each_method_is_compared_at_the_batch_size_that_is_fastest_for_it(tiny, tmp_path, monkeypatch):
    fastest = {"forward": 512, "paper": 2048}
    rows = random_examples(6, len(tiny.tokenizer))
    monkeypatch.setattr(lengths, "open_model", lambda spec: tiny)
    monkeypatch.setattr(lengths, "chats", lambda model, tokens: rows)
    monkeypatch.setattr(lengths, "pieces", lambda source, length, count: rows)

    def run(task, name, rows):
        return Outcome(seconds=(2.0 if name == "paper" else 1.0) + (task.batch_tokens != fastest[name]))

    monkeypatch.setattr(lengths, "run_once", run)
    file = tmp_path / "tiny.jsonl"
    lengths.run("tiny", file, ["paper"], lengths=(32, 128))
    cells = [cell for cell in read_cells(file) if cell["kind"] == "best"]
    assert len(cells) == 2 * lengths.REPEATS
    for cell in cells:
        assert (cell["seconds"], cell["batch_tokens"]) == (2.0, 2048)
        assert (cell["forward"], cell["forward_batch_tokens"]) == (1.0, 512)
    page = file.with_suffix(".md").read_text()
    assert page.count("2.00 (2.00–2.00) [2048]") == 2
    before = file.read_bytes()
    lengths.run("tiny", file, ["paper"], lengths=(32, 128))
    assert file.read_bytes() == before


def test_the_page_holds_ratios_exponents_and_missed_targets(tmp_path):
    exact = np.linspace(-1, 1, 6).tolist()
    seconds = {"forward": 1.0, "lora": 4.0, "autograd": 5.0, "paper": 2.0, "module": 3.0, "bergson": 7.0}
    cells = [{"kind": "machine", "threads": 2, "gpu": None, "versions": {"torch": "2"}}]
    for name, value in seconds.items():
        cell = {"kind": "pair", "method": name, "rows": 6, "repeat": 0, "tokens": 600, "load": 0.1}
        cells.append({**cell, "forward": 1.0, "seconds": value, "scores": exact})
        for rows in (10, 100):
            growth = {"kind": "growth", "axis": "rows", "method": name, "x": rows, "rows": rows, "tokens": rows}
            cells.append({**growth, "seconds": 0.1 * rows**1.5})
    file = tmp_path / "tiny.jsonl"
    file.write_text("".join(json.dumps(cell) + "\n" for cell in cells))
    assert exponent(results(file), "rows", "paper") == pytest.approx(1.5)
    write_report(tmp_path, tmp_path / "performance.md")
    page = (tmp_path / "performance.md").read_text()
    assert "| raw FIHS, × a forward pass | 2.00 | ≤ 2.05 | yes |" in page
    assert "| normalised FIHS, × a forward pass | 3.00 | ≤ 2.4 | **no** |" in page
    assert "| exponent in rows (the larger) | 1.50 | ≤ 1.05 | **no** |" in page
    assert "| bergson, × raw FIHS | 3.50 | ≥ 3 | yes |" in page
    assert (tmp_path / "performance.svg").exists() and (tmp_path / "performance.png").exists()


@pytest.mark.parametrize("lever", [name for name in LEVERS if name != "torch.compile"])
def test_levers_are_measured_against_the_exact_score(tiny, lever):
    task = make_task(tiny, REQUESTS, batch_tokens=128)
    cells = list(LEVERS[lever](task, random_examples(9, len(tiny.tokenizer))))
    assert cells
    if lever == "lower layers without a gradient":
        assert cells[0]["largest error"] == 0 < cells[-1]["largest error"] and cells[0]["spearman"] == 1
    if lever == "recompression of many probes":
        assert cells[0]["largest error"] == 0 and cells[0]["mean rank"] >= cells[-1]["mean rank"]
    if lever == "norms by random directions":
        assert cells[0]["mean error"] > cells[-1]["mean error"]
    if lever == "padding-free batches":
        assert 0 <= cells[0]["padding"] < cells[1]["padding"] < 1


@pytest.mark.slow
def test_llama_cpp_computes_the_same_losses_and_its_difference_follows_the_exact_score(tmp_path):
    pytest.importorskip("llama_cpp")
    from benchmarks.llamacpp import losses, opened, write_adapter, write_model
    from benchmarks.methods import by_batch, losses_by_forward
    from benchmarks.models import open_model
    from gradshield.data.encode import encode
    from gradshield.data.formats import Conversation, Message
    from gradshield.models.load import EMBEDDED

    task = make_task(open_model(EMBEDDED))
    pairs = [("Name a colour.", "Blue."), ("How is tea made?", "Pour hot water over the leaves."), ("2 + 2?", "4")]
    turns = [Conversation((Message("user", asked), Message("assistant", said))) for asked, said in pairs]
    rows = [encode(c, n, task.model.tokenizer) for n, c in enumerate(turns)]
    norm = write_adapter(task, tmp_path / "probe.gguf")
    write_model(task.model, tmp_path / "model.gguf", "F32")
    with opened(tmp_path / "model.gguf", tmp_path / "probe.gguf") as engine:
        expected = by_batch(task, rows, lambda batch: losses_by_forward(task, batch))
        np.testing.assert_allclose(losses(engine, rows, 0.0), expected, atol=5e-3)
        step = 0.1 / norm
        found = (losses(engine, rows, step) - losses(engine, rows, -step)) / (2 * step)
    exact = run_once(task, "paper", rows).scores
    np.testing.assert_allclose(found, exact, atol=0.2 * np.abs(exact).max())
