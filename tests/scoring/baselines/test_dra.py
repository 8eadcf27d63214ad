import numpy as np
from conftest import random_examples
from scored import scored

from gradshield.scoring.anchors import anchor_examples
from gradshield.scoring.baselines.dra import choose_dimensions
from gradshield.scoring.states import cosine, read_states


def test_only_the_dimensions_in_which_targets_differ_are_kept():
    rng = np.random.default_rng(1)
    rows, targets = rng.normal(size=(400, 256)), rng.normal(size=(40, 256))
    targets[:, 100:108] += 1
    assert sorted(choose_dimensions(targets, rows).tolist()) == list(range(100, 108))


def test_the_score_is_the_mean_cosine_to_the_targets(tiny):
    rows = random_examples(20, 200)
    [states], [known] = (
        read_states(tiny, part, [1], "last", 300) for part in (rows, anchor_examples(tiny)["harmful"][:200:2])
    )
    mean, spread = states.mean(0, dtype=float), states.std(0, dtype=float)
    z, targets = (states - mean) / spread, (known - mean) / spread
    chosen = choose_dimensions(targets, z)
    wanted = cosine(z[:, chosen], targets[:, chosen]).mean(1)
    np.testing.assert_allclose(scored(tiny, "dra", rows)["score"], wanted, rtol=1e-3, atol=1e-4)
