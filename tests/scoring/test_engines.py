"""Every engine gives what per-example autograd gives, however rows are batched, padded, ordered, or taken up again."""

from unittest.mock import patch

import numpy as np
import pytest
import torch
from conftest import random_examples
from scoring.gradients import REQUESTS, S, loss_by_autograd, offloaded, probe_by_autograd

from gradshield.data.encode import Example
from gradshield.models.load import Model, load_model
from gradshield.scoring.base import ScoreFunction
from gradshield.scoring.engine import score
from gradshield.scoring.fihs.autograd import autograd_scorer
from gradshield.scoring.fihs.contraction import contract
from gradshield.scoring.fihs.probe import probe_gradient
from gradshield.scoring.fihs.scorer import fihs_scorer

ROWS = 12


def fast(model: Model) -> ScoreFunction:
    return fihs_scorer(model, probe_gradient(model, REQUESTS, S, tolerance=0), "paper")


def short_of_memory(model: Model) -> ScoreFunction:
    """Where not even one row fits unless its activations are computed again."""
    scorer = fast(model)

    def one(batch):
        def tight(*args, recompute=False, **kwargs):
            if not recompute:
                raise MemoryError
            return contract(*args, recompute=True, **kwargs)

        with patch("gradshield.scoring.fihs.scorer.contract", tight):
            return scorer(batch)

    return one


ENGINES = {
    "contraction": lambda tiny, folder: fast(tiny),
    "autograd": lambda tiny, folder: autograd_scorer(tiny, REQUESTS, S),
    "device map": lambda tiny, folder: fast(load_model(folder, device="auto")),
    "offloaded": lambda tiny, folder: fast(offloaded("dense")),
    "recomputed": lambda tiny, folder: short_of_memory(tiny),
    "bfloat16": lambda tiny, folder: fast(load_model(folder, dtype="bfloat16")),
}


def in_order(rows: list[Example], scorer: ScoreFunction, tmp_path) -> np.ndarray:
    return score(rows, scorer, batch_tokens=256)["score"]


def one_by_one(rows: list[Example], scorer: ScoreFunction, tmp_path) -> np.ndarray:
    return score(rows, scorer, batch_tokens=1)["score"]


def all_at_once(rows: list[Example], scorer: ScoreFunction, tmp_path) -> np.ndarray:
    """The shortest rows beside the longest: as much padding as there can be."""
    return score(rows, scorer, batch_tokens=10**6)["score"]


def reversed_with_doubles(rows: list[Example], scorer: ScoreFunction, tmp_path) -> np.ndarray:
    return score([*rows, *rows][::-1], scorer, batch_tokens=256)["score"][::-1][: len(rows)]


def taken_up_again(rows: list[Example], scorer: ScoreFunction, tmp_path) -> np.ndarray:
    journal, calls = tmp_path / "journal", []

    def dying(batch):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return scorer(batch)

    with pytest.raises(KeyboardInterrupt):
        score(rows, dying, batch_tokens=128, journal=journal)
    return score(rows, scorer, batch_tokens=128, journal=journal)["score"]


@pytest.fixture(scope="module")
def exact(tiny) -> np.ndarray:
    query = probe_by_autograd(tiny)
    gradients = (loss_by_autograd(tiny, e) for e in random_examples(ROWS, len(tiny.tokenizer)))
    return np.array([sum(float((g[n] * query[n]).sum()) for n in query) for g in gradients])


@pytest.mark.parametrize("way", [in_order, one_by_one, all_at_once, reversed_with_doubles, taken_up_again])
@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_is_per_example_autograd(tiny, tiny_folder, exact, engine, way, tmp_path):
    torch.manual_seed(0)
    found = way(random_examples(ROWS, len(tiny.tokenizer)), ENGINES[engine](tiny, tiny_folder), tmp_path)
    tolerance = 0.05 if engine == "bfloat16" else 1e-5  # of the largest score
    np.testing.assert_allclose(found, exact, rtol=0, atol=tolerance * np.abs(exact).max())
