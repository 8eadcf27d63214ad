import numpy as np
import torch
from conftest import random_examples
from scored import scored

from gradshield.models.batching import losses
from gradshield.scoring.adapter import adapter_of, laid_over
from gradshield.scoring.anchors import anchor_examples
from gradshield.scoring.fihs.autograd import gradient_of, loss_of


def gradient(model, row) -> torch.Tensor:
    return torch.cat([g.flatten() for g in gradient_of(model.weights, loss_of(model, row, [])).values()]).double()


def test_at_the_aligned_model_it_is_the_product_with_the_targets_mean_gradient(tiny):
    rows, targets = random_examples(5, 200), anchor_examples(tiny)["harmful"][::2][:4]
    mean = torch.stack([gradient(tiny, target) for target in targets]).mean(0)
    wanted = np.array([float(gradient(tiny, row) @ mean) for row in rows])
    found = scored(tiny, "tracin:targets=4", rows)["score"]
    np.testing.assert_allclose(found, wanted, atol=0.02 * np.abs(wanted).max())


def test_a_step_on_the_highest_row_lowers_the_targets_loss_most(tiny):
    rows, targets = random_examples(8, 200), anchor_examples(tiny)["harmful"][::2][:4]
    found, after = scored(tiny, "tracin:targets=4", rows)["score"], []
    start = {name: weight.clone() for name, weight in tiny.weights.items()}
    for row in rows:
        step = gradient_of(tiny.weights, loss_of(tiny, row, []))
        for name, weight in tiny.weights.items():
            weight.data.sub_(1e-4 * step[name])
        with torch.no_grad():
            after.append(float(losses(tiny, targets).mean()))
        for name, weight in tiny.weights.items():
            weight.data.copy_(start[name])
    assert np.argsort(after)[0] == np.argmax(found) and np.argsort(after)[-1] == np.argmin(found)


def test_more_checkpoints_add_their_products_at_their_learning_rates(tiny, own_cache):
    import os
    from pathlib import Path

    from safetensors.numpy import load_file

    rows, targets = random_examples(20, 200), anchor_examples(tiny)["harmful"][::2][:2]
    found = scored(tiny, "tracin:targets=2,checkpoints=3,learning_rate=1e-2", rows)["score"]
    [file] = Path(os.environ["GRADSHIELD_CACHE"]).glob("tracin-checkpoints*")
    arrays = load_file(file)
    assert len(arrays["rates"]) == 3 and arrays["rates"][-1] == np.float64(5e-3)
    wanted = 1e-2 * np.array([float(gradient(tiny, r) @ sum(gradient(tiny, t) for t in targets)) / 2 for r in rows])
    for k in range(2):
        with laid_over(tiny, adapter_of(tiny, arrays, str(k))):
            mean = sum(gradient(tiny, t) for t in targets) / 2
            wanted += arrays["rates"][k + 1] * np.array([float(gradient(tiny, row) @ mean) for row in rows])
    np.testing.assert_allclose(found, wanted, atol=0.02 * np.abs(wanted).max())
