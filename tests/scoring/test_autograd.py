"""The slow engine is plain autograd, and the contraction over LoRA's weights equals autograd through an adapter."""

import copy

import numpy as np
import pytest
import torch
from conftest import random_examples
from scoring.gradients import REQUESTS, S, loss_by_autograd, probe_by_autograd

from gradshield.base.errors import UserError
from gradshield.models.load import Model
from gradshield.scoring.fihs.autograd import autograd_scorer
from gradshield.scoring.fihs.contraction import contract
from gradshield.scoring.fihs.probe import inner, lora_inputs, minus, probe_gradient
from gradshield.scoring.fihs.scorer import DIRECTIONS, fihs_scorer


@pytest.mark.parametrize("mapping", ["identity", "sign"])
def test_the_slow_engine_is_the_mapped_gradient_times_the_probes(tiny, mapping):
    examples = random_examples(4, len(tiny.tokenizer))
    query = probe_by_autograd(tiny)
    found = autograd_scorer(tiny, REQUESTS, S, mapping=mapping)(examples)["score"]
    for n, example in enumerate(examples):
        gradient = loss_by_autograd(tiny, example)
        mapped = {k: g.sign() if mapping == "sign" else g for k, g in gradient.items()}
        parts = torch.stack([(mapped[k] * query[k]).sum() for k in query])
        assert abs(found[n] - float(parts.sum())) <= 1e-4 * float(parts.abs().sum())


def test_all_weights_add_what_the_linears_leave_out(tiny):
    examples = random_examples(3, len(tiny.tokenizer))
    linear, everything = (autograd_scorer(tiny, REQUESTS, S, weights=w)(examples)["score"] for w in ("linear", "all"))
    assert not np.allclose(linear, everything)
    rest = {n: p for n, p in tiny.net.named_parameters() if n.removesuffix(".weight") not in tiny.linears}
    assert any("embed" in n for n in rest) and any("norm" in n for n in rest)


def test_engines_agree_on_the_linears(tiny):
    examples = random_examples(6, len(tiny.tokenizer))
    slow = autograd_scorer(tiny, REQUESTS, S)(examples)["paper"]
    fast = fihs_scorer(tiny, probe_gradient(tiny, REQUESTS, S, tolerance=0), "paper")(examples)["score"]
    np.testing.assert_allclose(fast, slow, rtol=1e-4, atol=1e-5 * np.abs(slow).max())


def test_the_cosine_is_autograds_but_for_the_spread_of_its_norms(tiny):
    """Where u and v are Gaussian, (vᵀ G u)² has a mean of ‖G‖² and a variance of at most 8 ‖G‖⁴ (for rank one). So the
    mean over the directions, summed over modules, has a variance of at most 8 Σ ‖G_m‖⁴ / DIRECTIONS."""
    examples = random_examples(40, len(tiny.tokenizer))
    probe = probe_gradient(tiny, REQUESTS, S, tolerance=0)
    exact = contract(tiny, examples, probe, exact_norms=True)
    slow = autograd_scorer(tiny, REQUESTS, S)(examples)["cosine"]
    cosines = (exact.dots.sum(1) / exact.norms.sum(1).sqrt()).numpy()
    np.testing.assert_allclose(cosines, slow, rtol=1e-4, atol=1e-5 * np.abs(slow).max())
    fast = fihs_scorer(tiny, probe, "cosine")(examples)["score"]
    estimated = (slow / fast) ** 2  # ‖G‖² by the directions, over ‖G‖²
    spread = ((8 * exact.norms.square().sum(1) / DIRECTIONS).sqrt() / exact.norms.sum(1)).numpy()
    assert (np.abs(estimated - 1) <= 3 * spread).all()
    assert np.mean((estimated - 1) ** 2) <= np.mean(spread**2)


def test_fihs_over_lora_equals_autograd_through_an_adapter(tiny):
    from peft import LoraConfig, get_peft_model

    probe = probe_gradient(tiny, REQUESTS, S, tolerance=0)
    inputs = lora_inputs(probe)
    examples = random_examples(4, len(tiny.tokenizer))
    found = fihs_scorer(tiny, probe, "paper", lora=True)(examples)["score"]
    config = LoraConfig(r=8, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    net = get_peft_model(copy.deepcopy(tiny.net), config)
    for name, module in net.base_model.model.named_modules():
        if name in inputs:
            module.lora_A["default"].weight.data.copy_(inputs[name])
    adapter = {n: p for n, p in net.named_parameters() if "lora_B" in n}
    wrapped = Model("adapter", net, tiny.tokenizer, "adapter")

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(adapter.values()))])

    from gradshield.data.encode import encode_request

    def s_of(request: str) -> torch.Tensor:
        ids = torch.tensor(encode_request(request, tiny.tokenizer)).long()
        return S(wrapped.net(input_ids=ids[None]).logits[0, -1])

    query = gradient(torch.stack([s_of(r) for r in REQUESTS]).mean())
    for n, example in enumerate(examples):
        ids = torch.tensor(example.ids).long()
        keep = torch.tensor(example.mask[1:])
        logits = wrapped.net(input_ids=ids[None]).logits[0, :-1]
        expected = gradient(torch.nn.functional.cross_entropy(logits[keep], ids[1:][keep])) @ query
        assert abs(found[n] - float(expected)) <= 1e-4 * max(abs(float(expected)), np.abs(found).max())


def test_orthogonal_contrast_has_no_part_along_the_benign_probe(tiny):
    harmful, benign = (probe_gradient(tiny, r, S) for r in (REQUESTS, ["What is the capital of Peru?"]))
    rest = minus(harmful, benign, inner(harmful, benign) / inner(benign, benign))
    assert abs(inner(rest, benign)) < 1e-4 * (inner(harmful, harmful) * inner(benign, benign)) ** 0.5
    dense = sum(float((f.dense() * benign.factors[n].dense()).sum()) for n, f in harmful.factors.items())
    assert inner(harmful, benign) == pytest.approx(dense, rel=1e-4)


def test_quantised_weights_are_refused_by_the_slow_engine(tiny_folder):
    pytest.importorskip("bitsandbytes")
    from gradshield.models.load import load_model

    with pytest.raises(UserError, match="no gradient"):
        autograd_scorer(load_model(tiny_folder, quantize="4bit"), REQUESTS, S)
