import numpy as np
from conftest import random_examples
from scored import scored

from gradshield.scoring.anchors import anchor_examples
from gradshield.scoring.baselines.dra import dimensions, whitening
from gradshield.scoring.states import cosine, read_states


def test_after_whitening_directions_are_uncorrelated_and_of_one_size():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(4000, 6)) @ rng.normal(size=(6, 6)) + 3
    mean, whiten = whitening(rows)
    found = np.cov((rows - mean) @ whiten, rowvar=False)
    assert np.abs(found - np.diag(np.diag(found))).max() < 1e-6
    assert np.diag(found).max() <= 1 and np.median(np.diag(found)) > 0.9


def test_only_the_dimensions_that_part_targets_from_the_file_are_kept():
    rng = np.random.default_rng(0)
    file, targets = rng.normal(size=(300, 64)), rng.normal(size=(20, 64))
    targets[:, [5, 9]] += 6
    assert set(dimensions(file, targets).tolist()) == {5, 9}


def test_it_is_the_cosine_with_the_targets_in_what_is_kept(tiny):
    rows, targets = random_examples(30, 200), anchor_examples(tiny)["harmful"][::2][:6]
    file, known = (read_states(tiny, part, [2], "last", 400)[0].astype(float) for part in (rows, targets))
    mean, whiten = whitening(file)
    kept = dimensions((file - mean) @ whiten, (known - mean) @ whiten)
    target = ((known - mean) @ whiten)[:, kept].mean(0)
    wanted = cosine(((file - mean) @ whiten)[:, kept], target[None])[:, 0]
    np.testing.assert_allclose(scored(tiny, "dra:targets=6", rows)["score"], wanted, atol=1e-4)
