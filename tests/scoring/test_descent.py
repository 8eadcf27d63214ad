"""The mean gradient of rows in factors, against autograd."""

import torch
from conftest import random_examples

from gradshield.scoring.fihs.autograd import gradient_of, loss_of
from gradshield.scoring.fihs.descent import first_tokens, loss_gradient


def test_factors_are_the_mean_gradient_that_autograd_finds(tiny):
    rows = random_examples(18, 200)
    for unit in (False, True):
        found = loss_gradient(tiny, rows, unit=unit, tolerance=0)
        wanted = {name: torch.zeros_like(w) for name, w in tiny.weights.items()}
        for row in rows:
            gradient = gradient_of(tiny.weights, loss_of(tiny, row, []))
            size = sum(float(g.square().sum()) for g in gradient.values()) ** 0.5 if unit else 1.0
            for name, g in gradient.items():
                wanted[name] += g / size / len(rows)
        for name, factors in found.factors.items():
            torch.testing.assert_close(factors.dense(), wanted[f"{name}.weight"], rtol=1e-3, atol=1e-4)


def test_a_row_is_cut_behind_its_first_response_tokens():
    [row] = random_examples(1, 200)
    cut = first_tokens(row, 3)
    assert cut.mask.sum() == 3 and cut.mask[-1] and (cut.ids == row.ids[: len(cut.ids)]).all()
    assert len(first_tokens(row, 500).ids) == len(row.ids)
