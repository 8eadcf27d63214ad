import os
from pathlib import Path

import numpy as np
import torch
from conftest import random_examples
from safetensors.numpy import load_file
from scored import scored

from gradshield.scoring.adapter import adapter_of
from gradshield.scoring.baselines.sqsd import normalise_modules
from gradshield.scoring.fihs.autograd import gradient_of, loss_of
from gradshield.scoring.fihs.probe import Factors, ProbeGradient


def test_each_module_is_of_unit_length_and_nothing_stays_nothing():
    inp, out = torch.randn(2, 5), torch.randn(2, 4)
    delta = {"one": Factors(inp, out), "none": Factors(inp, 0 * out)}
    found = normalise_modules(ProbeGradient(delta)).factors
    torch.testing.assert_close(found["one"].dense().norm(), torch.tensor(1.0))
    torch.testing.assert_close(found["one"].dense(), delta["one"].dense() / delta["one"].dense().norm())
    assert not found["none"].dense().any()


def test_it_is_the_sum_of_cosines_with_what_training_added(tiny):
    rows = random_examples(4, 200)
    found = scored(tiny, "sqsd:epochs=0.3,learning_rate=1e-2", rows)["score"]
    [file] = Path(os.environ["GRADSHIELD_CACHE"]).glob("sqsd-directions*")
    danger, safety = (adapter_of(tiny, load_file(file), kind).delta() for kind in ("harmful", "refusal"))
    for row, score in zip(rows, found):
        wanted = 0.0
        for name, g in gradient_of(tiny.weights, loss_of(tiny, row, [])).items():
            for direction, sign in ((danger, 1), (safety, -1)):
                added = direction.factors[name.removesuffix(".weight")].dense()
                wanted += sign * float(torch.cosine_similarity(-g.flatten(), added.flatten(), 0))
        np.testing.assert_allclose(score, wanted, atol=1e-3)
