"""A model whose weights accelerate moves in block by block scores as one that is all there, and stays moved out."""

import gc
import weakref

import pytest
import torch
from conftest import random_examples, random_readouts
from scoring.gradients import REQUESTS, S, build, offloaded

from gradshield.base.errors import UserError
from gradshield.scoring.fihs.autograd import autograd_scorer
from gradshield.scoring.fihs.contraction import contract, random_directions
from gradshield.scoring.fihs.probe import probe_gradient
from gradshield.scoring.intent.reading import read_batch


@pytest.mark.parametrize("kind", ["dense", "mixtral", "gpt-oss"])
@pytest.mark.parametrize("disk", [False, True], ids=["cpu", "disk"])
def test_an_offloaded_model_scores_as_one_that_is_all_there(kind, disk, tmp_path):
    whole, away = build(kind), offloaded(kind, str(tmp_path) if disk else None)
    rows = random_examples(6, len(whole.tokenizer))
    probe, again = (probe_gradient(m, REQUESTS, S) for m in (whole, away))
    for name, factors in probe.factors.items():
        torch.testing.assert_close(again.factors[name].dense(), factors.dense(), rtol=1e-4, atol=1e-7)
    random = random_directions(probe.factors, 4)
    one, other = (contract(m, rows, probe, random) for m in (whole, away))
    for expected, found in ((one.dots, other.dots), (one.norms, other.norms), (one.loss, other.loss)):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))
    for expected, found in zip(*(read_batch(m, random_readouts(m, 2), rows) for m in (whole, away))):
        torch.testing.assert_close(torch.as_tensor(found.tokens), torch.as_tensor(expected.tokens))
        torch.testing.assert_close(torch.as_tensor(found.asked), torch.as_tensor(expected.asked))
    assert all(weight.is_meta for block in away.layers for weight in block.parameters())


def test_the_forward_leaves_no_block_behind(monkeypatch):
    """Otherwise autograd would hold on to every weight that was moved in, and all would be there at once."""
    away = offloaded("dense")
    probe = probe_gradient(away, REQUESTS, S)
    shape, moved_in = away.layers[0].mlp.gate_proj.weight.shape, []
    real = torch.nn.functional.linear

    def watching(x, weight, bias=None):
        if weight.shape == shape:
            moved_in.append(weakref.ref(weight))
        return real(x, weight, bias)

    def count(*_):
        gc.collect()
        alive.append(sum(ref() is not None for ref in moved_in))

    monkeypatch.setattr(torch.nn.functional, "linear", watching)
    alive = []
    away.net.get_output_embeddings().register_forward_pre_hook(count)
    contract(away, random_examples(4, len(away.tokenizer)), probe)
    assert len(moved_in) == 2 * 2 * len(away.layers) and alive == [0]  # gate and up, forward and once more


def test_slow_engine_refuses_weights_that_are_not_there():
    away = offloaded("dense")
    with pytest.raises(UserError, match="does not fit on the devices"):
        autograd_scorer(away, REQUESTS, S, mapping="sign")
