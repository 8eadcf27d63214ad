import numpy as np
from conftest import random_examples
from scored import scored

from gradshield.scoring.fihs.autograd import gradient_of, loss_of


def test_it_is_the_squared_norm_of_the_gradient_and_the_length(tiny):
    rows = random_examples(6, 200)
    wanted = []
    for row in rows:
        gradient = gradient_of(tiny.weights, loss_of(tiny, row, []))
        norm = sum(float(g.square().sum()) for g in gradient.values())
        wanted.append(np.log(norm + 1) + np.log(row.mask.sum() + 1))
    np.testing.assert_allclose(scored(tiny, "self-inf-n", rows)["score"], wanted, rtol=1e-4)
