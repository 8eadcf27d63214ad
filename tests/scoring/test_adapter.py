"""The adapter over the frozen model: what it adds is what its factors say, and nothing of it stays."""

import copy

import numpy as np
import pytest
import torch
from conftest import freeze, random_examples

from gradshield.base.errors import UserError
from gradshield.models.batching import losses
from gradshield.scoring.adapter import adapter_of, backward, laid_over, new_adapter, train_adapter


@torch.no_grad()
def loss(model, rows):
    return losses(model, rows)


def test_training_lowers_the_loss_by_what_the_delta_adds_to_the_weights(tiny):
    rows = random_examples(10, 200)
    before, adapter = loss(tiny, rows), new_adapter(tiny)
    with laid_over(tiny, adapter):
        torch.testing.assert_close(loss(tiny, rows), before)  # B is zero
    train_adapter(tiny, adapter, rows, epochs=10, learning_rate=1e-2, tokens=100)
    kept = adapter_of(tiny, adapter.arrays("x"), "x")
    with laid_over(tiny, kept):
        after = loss(tiny, rows)
    assert float(after.mean()) < float(before.mean()) - 0.5
    merged = copy.deepcopy(tiny.net)
    for name, added in adapter.delta().factors.items():
        merged.get_submodule(name).weight.data += added.dense()
    torch.testing.assert_close(loss(freeze("merged", merged, tiny.tokenizer), rows), after, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(loss(tiny, rows), before)


def test_a_batch_computed_in_parts_trains_the_same(tiny):
    rows, found = random_examples(8, 200), []
    for tokens in (50, 5000):
        adapter = new_adapter(tiny)
        train_adapter(tiny, adapter, rows, epochs=3, learning_rate=1e-2, tokens=tokens)
        with laid_over(tiny, adapter):
            found.append(loss(tiny, rows))
    torch.testing.assert_close(*found, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("most", [2, 0])
def test_out_of_memory_half_way_through_a_backward_pass_changes_no_gradient(tiny, most):
    """Nor does what an earlier batch has added to it; a row that does not fit by itself is said."""
    rows, weights, adapter = random_examples(7, 200), np.linspace(0.1, 1, 7), new_adapter(tiny)
    given = [*adapter.a.values(), *adapter.b.values()]
    with laid_over(tiny, adapter):
        wanted = backward(tiny, adapter, rows, weights, 4096)
        expected = [weight.grad for weight in given]

        def refuse(gradient):  # above this block, the gradients are made by then
            if len(gradient) > most:
                raise torch.OutOfMemoryError("no")

        def watch(_module, _args, output):
            output.register_hook(refuse)

        handle = tiny.layers[1].mlp.register_forward_hook(watch)
        for weight in given:
            weight.grad = torch.ones_like(weight)
        try:
            if not most:
                with pytest.raises(UserError, match="does not fit even alone; lower --max-length"):
                    backward(tiny, adapter, rows, weights, 4096)
                return
            np.testing.assert_allclose(backward(tiny, adapter, rows, weights, 4096), wanted, rtol=1e-5)
        finally:
            handle.remove()
    for weight, gradient in zip(given, expected, strict=True):
        torch.testing.assert_close(weight.grad, gradient + 1)
