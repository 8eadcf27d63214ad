import numpy as np
from conftest import random_examples
from scored import scored

from gradshield.scoring.anchors import anchor_examples
from gradshield.scoring.baselines.dra import choose_dimensions, whitening
from gradshield.scoring.states import cosine, read_states


def test_whitened_states_are_uncorrelated_and_of_variance_one():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(500, 6)) @ rng.normal(size=(6, 6)) + 3
    rows = np.hstack([rows, rows[:, :1]])  # a seventh dimension that adds nothing
    z = (rows - rows.mean(0)) @ whitening(np.cov(rows.T, bias=True), len(rows) - 1)
    np.testing.assert_allclose(np.cov(z.T, bias=True), np.eye(6), atol=1e-8)


def test_only_the_dimensions_in_which_targets_differ_are_kept():
    rng = np.random.default_rng(1)
    rows, targets = rng.normal(size=(400, 256)), rng.normal(size=(40, 256))
    targets[:, 100:108] += 1
    assert sorted(choose_dimensions(targets, rows).tolist()) == list(range(100, 108))


def test_the_score_is_the_mean_cosine_to_the_targets(tiny):
    rows = random_examples(20, 200)
    last = len(tiny.layers) - 1
    [states], [known] = (
        read_states(tiny, part, [last], "last", 300) for part in (rows, anchor_examples(tiny)["harmful"][:200:2])
    )
    mean = states.astype(np.float64).mean(0)
    whiten = whitening(np.cov((states - mean).T, bias=True), len(rows) - 1)
    z, targets = (states - mean) @ whiten, (known - mean) @ whiten
    chosen = choose_dimensions(targets, z)
    wanted = cosine(z[:, chosen], targets[:, chosen]).mean(1)
    np.testing.assert_allclose(scored(tiny, "dra", rows)["score"], wanted, rtol=1e-3, atol=1e-4)
