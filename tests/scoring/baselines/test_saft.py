import numpy as np
from conftest import random_examples
from scored import scored

from gradshield.scoring.baselines.saft import principal_directions
from gradshield.scoring.states import read_states


def test_the_direction_of_rank_one_rows_is_theirs():
    rng = np.random.default_rng(0)
    v = rng.normal(size=12)
    v /= np.linalg.norm(v)
    length = rng.normal(size=(30, 1))
    rows = length * v + 5.0 + 1e-3 * rng.normal(size=(30, 12))
    mean, vectors = principal_directions([rows[:7], rows[7:]], 1, centre=True)
    np.testing.assert_allclose(abs(vectors[:, 0] @ v), 1, atol=1e-4)
    np.testing.assert_allclose(
        np.square((rows - mean) @ vectors[:, 0]), np.square(length - length.mean())[:, 0], atol=0.02
    )
    _, raw = principal_directions([rows], 1, centre=False)
    assert abs(raw[:, 0] @ np.full(12, 12**-0.5)) > 0.99  # without centring, it is the mean's


def test_scores_are_the_left_singular_vectors_of_the_files_states(tiny):
    rows = random_examples(20, 200)
    [states] = read_states(tiny, rows, [1], "last", 300)
    u, s, _ = np.linalg.svd(states - states.mean(0), full_matrices=False)
    for k in (1, 3):
        wanted = np.square(u[:, :k] * s[:k]).mean(1)
        np.testing.assert_allclose(scored(tiny, f"saft:components={k}", rows)["score"], wanted, rtol=1e-3)
