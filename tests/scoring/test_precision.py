"""Scores of weights in sixteen, eight or four bits are those of full precision, as far as these can hold them."""

import numpy as np
import pytest
import torch
from conftest import random_examples
from scoring.gradients import REQUESTS, S

from gradshield.models.load import Model, load_model
from gradshield.scoring.fihs.contraction import contract
from gradshield.scoring.fihs.probe import Factors, ProbeGradient, probe_gradient
from gradshield.scoring.fihs.scorer import fihs_scorer


def test_quantised_linears_score_as_their_dequantised_weights(tiny_folder):
    bnb = pytest.importorskip("bitsandbytes")
    model, plain = load_model(tiny_folder, quantize="4bit"), load_model(tiny_folder)
    assert {type(m).__name__ for m in model.linears.values()} == {"Linear4bit"} and model.coverage()[0] == 1.0
    for name, module in model.linears.items():
        weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        plain.linears[name].weight.data.copy_(weight)
    examples = random_examples(5, len(model.tokenizer))
    probe = probe_gradient(plain, REQUESTS, S)
    expected, found = (contract(m, examples, probe).dots for m in (plain, model))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_8_bit_linears_err_by_little_more_than_the_rounding_of_their_weights(tiny_folder):
    """They round a row's activations as they round its weights, in the forward and in the backward pass: three times
    as many roundings, whose errors add up in squares, and half as much again for activations being less even."""
    pytest.importorskip("bitsandbytes")
    model, plain = load_model(tiny_folder, quantize="8bit"), load_model(tiny_folder)
    assert {type(m).__name__ for m in model.linears.values()} == {"Linear8bitLt"} and model.coverage()[0] == 1.0
    examples = random_examples(24, len(model.tokenizer))
    probe = probe_gradient(plain, REQUESTS, S)
    expected, found = (contract(m, examples, probe).dots.sum(1) for m in (plain, model))
    for module in plain.linears.values():
        step = module.weight.data.abs().amax(1, keepdim=True) / 127
        module.weight.data = (module.weight.data / step).round() * step
    part = (contract(plain, examples, probe).dots.sum(1) - expected).norm()
    assert 0 < (found - expected).norm() <= 1.5 * 3**0.5 * part < expected.norm()


@pytest.mark.parametrize("variant", ["paper", "module"])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits_give_the_same_scores_of_long_rows_too(tiny_folder, dtype, lora, variant):
    def scored(model: Model) -> np.ndarray:
        examples = random_examples(6, len(model.tokenizer), longest=400)
        return fihs_scorer(model, probe_gradient(model, REQUESTS, S), variant, lora=lora)(examples)["score"]

    exact, rough = (scored(load_model(tiny_folder, dtype=each)) for each in ("float32", dtype))
    np.testing.assert_allclose(rough, exact, rtol=0, atol=0.05 * np.abs(exact).max())


def test_float16_holds_the_gradients_of_a_long_row_in_a_model_whose_are_small(tiny_folder):
    """Those of the mean over a row's tokens would be below what float16 can hold."""

    def dots(dtype: str) -> torch.Tensor:
        model = load_model(tiny_folder, dtype=dtype)
        model.net.model.norm.weight.mul_(1e-4)
        probe = probe_gradient(load_model(tiny_folder), REQUESTS, S)  # in float32, and of ordinary size
        factors = {
            name: Factors(f.inp.to(model.net.dtype), f.out.to(model.net.dtype)) for name, f in probe.factors.items()
        }
        return contract(model, random_examples(6, len(model.tokenizer), longest=400), ProbeGradient(factors)).dots.sum(
            1
        )

    exact = dots("float32")
    torch.testing.assert_close(dots("float16"), exact, rtol=0, atol=0.05 * float(exact.abs().max()))


@pytest.mark.parametrize("variant", ["paper", "cosine", "module"])
def test_float16_holds_activations_near_its_largest_number(tiny_folder, variant):
    def scored(dtype: str) -> np.ndarray:
        model = load_model(tiny_folder, dtype=dtype)
        for layer in model.net.model.layers:  # what comes into down_proj is large, what comes out is not
            layer.mlp.up_proj.weight.mul_(2.0**11)
            layer.mlp.down_proj.weight.mul_(2.0**-11)
        examples = random_examples(6, len(model.tokenizer), longest=60)
        return fihs_scorer(model, probe_gradient(model, REQUESTS, S), variant)(examples)["score"]

    exact, rough = scored("float32"), scored("float16")
    assert np.isfinite(rough).all()
    np.testing.assert_allclose(rough, exact, rtol=0, atol=0.05 * np.abs(exact).max())
