import importlib.util

import numpy as np
import pytest
import torch
from conftest import random_examples
from scored import scored

from gradshield.base.errors import UserError
from gradshield.scoring.anchors import anchor_examples
from gradshield.scoring.fihs.autograd import gradient_of, loss_of


def test_a_missing_library_is_said_when_the_scorer_is_built(tiny, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "kronfluence" else real(name, *a))
    with pytest.raises(UserError, match="--scorer influence needs the package kronfluence"):
        scored(tiny, "influence", random_examples(2, 200))


def test_without_curvature_it_is_the_product_with_the_targets_gradients(tiny):
    pytest.importorskip("kronfluence")
    rows, targets = random_examples(5, 200), anchor_examples(tiny)["harmful"][::2][:2]

    def gradient(row):
        return torch.cat([g.flatten() for g in gradient_of(tiny.weights, loss_of(tiny, row, [])).values()])

    mean = sum(gradient(target) for target in targets) / 2
    wanted = np.array([float(gradient(row) @ mean) for row in rows])
    found = scored(tiny, "influence:strategy=identity,targets=2", rows)["score"]
    np.testing.assert_allclose(found, wanted, rtol=1e-2, atol=1e-3 * np.abs(wanted).max())
