"""Experts stored as one 3-D weight are scored as the Linears that they are, held to per-example autograd."""

import copy

import numpy as np
import pytest
import torch
from conftest import freeze, random_examples, tiny_net, tiny_tokenizer
from scoring.gradients import CONFIGS, REQUESTS, SIZE, S, moe
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Llama4TextConfig,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from typer.testing import CliRunner

from gradshield.base.errors import UserError
from gradshield.cli.commands import app
from gradshield.data.encode import Example, encode
from gradshield.data.formats import Conversation, Message
from gradshield.models.experts import Expert
from gradshield.models.hooks import gradients_from, linear_hooks
from gradshield.models.load import Model, load_model
from gradshield.scoring.fihs.autograd import autograd_scorer, gradient_of, loss_of, s_of
from gradshield.scoring.fihs.contraction import contract, random_directions
from gradshield.scoring.fihs.parts import fihs_parts
from gradshield.scoring.fihs.probe import probe_gradient, probe_gradients
from gradshield.scoring.fihs.scorer import fihs_scorer
from gradshield.scoring.intent.corpus import Text
from gradshield.scoring.intent.fit import fit_readouts
from gradshield.scoring.intent.reading import intent_scores


@pytest.fixture(params=CONFIGS, scope="module")
def model(request) -> Model:
    return moe(request.param)


def dense_probe(model: Model) -> dict[str, torch.Tensor]:
    gradients = [gradient_of(model.weights, s_of(model, request, S)) for request in REQUESTS]
    return {name: torch.stack([g[name] for g in gradients]).mean(0) for name in model.weights}


def test_experts_are_covered_and_only_routers_are_not(model):
    share, missing = model.coverage()
    assert share > 0.9 and all("gate.weight" in name or "router.weight" in name for name in missing)
    assert any(weight.ndim == 3 for weight in model.weights.values())


def test_dots_and_norms_equal_per_example_autograd_on_the_stacked_weights(model):
    expected = dense_probe(model)
    probe = probe_gradient(model, REQUESTS, S, tolerance=0)
    examples = random_examples(9, len(model.tokenizer))
    result = contract(model, examples, probe, exact_norms=True)
    for n, example in enumerate(examples):
        gradient = gradient_of(model.weights, loss_of(model, example, []))
        dots = torch.stack([(gradient[k] * expected[k]).sum() for k in expected])
        norms = torch.stack([g.square().sum() for g in gradient.values()])
        assert abs(result.dots[n].sum() - dots.sum()) <= 1e-5 * dots.abs().sum()
        torch.testing.assert_close(result.norms[n].sum(), norms.sum(), rtol=1e-4, atol=0)
        stacked = {name for name in expected if expected[name].ndim == 3}
        assert stacked and all(float(gradient[name].abs().max()) > 0 for name in stacked)
        for name in stacked:  # each expert has its own
            number = [f"{e}.{name.rpartition('.')[2]}" for e in range(len(expected[name]))]
            columns = [list(probe.factors).index(f"{name.rpartition('.')[0]}.{one}") for one in number]
            per_expert = (gradient[name] * expected[name]).sum((1, 2))
            size = float(dots.abs().sum())
            torch.testing.assert_close(result.dots[n, columns], per_expert, rtol=1e-4, atol=1e-6 * size)


def test_a_probes_gradient_does_not_depend_on_the_probes_in_its_batch(model):
    together = probe_gradients(model, [*REQUESTS, "a"], S)
    for request, gradient in zip([*REQUESTS, "a"], together, strict=True):
        (alone,) = probe_gradients(model, [request], S)
        for name, factors in gradient.factors.items():
            one = alone.factors[name]
            assert len(factors.inp) == len(one.inp)
            wanted = one.dense()
            torch.testing.assert_close(factors.dense(), wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def test_scores_do_not_depend_on_batch_padding_or_order(model):
    probe = probe_gradient(model, REQUESTS, S)
    random = random_directions(probe.factors, 4)
    examples = random_examples(12, len(model.tokenizer))
    whole = contract(model, examples, probe, random)
    shuffled = np.random.default_rng(1).permutation(len(examples))
    again = contract(model, [examples[n] for n in shuffled], probe, random)
    single = [contract(model, [e], probe, random) for e in examples]
    scale, size = float(whole.dots.abs().max()), float(whole.norms.max())
    torch.testing.assert_close(again.dots, whole.dots[torch.tensor(shuffled)], rtol=1e-4, atol=1e-6 * scale)
    torch.testing.assert_close(torch.cat([s.dots for s in single]), whole.dots, rtol=1e-4, atol=1e-6 * scale)
    torch.testing.assert_close(torch.cat([s.norms for s in single]), whole.norms, rtol=1e-4, atol=1e-6 * size)


def test_experts_that_no_probe_token_reaches_have_rank_zero_and_add_nothing():
    model = moe("qwen3", num_experts=64, num_experts_per_tok=1)
    probe = probe_gradient(model, ["a"], S, tolerance=0)
    unreached = [name for name, f in probe.factors.items() if not len(f.inp)]
    assert set(probe.factors) == set(model.linears) and all(".experts." in name for name in unreached)
    gradient = gradient_of(model.weights, s_of(model, "a", S))
    for name in unreached:
        holder, number, projection = name.rsplit(".", 2)
        assert not gradient[f"{holder}.{projection}"][int(number)].any()
    examples = random_examples(6, len(model.tokenizer))
    result, columns = contract(model, examples, probe, exact_norms=True), [n in unreached for n in probe.factors]
    assert sum(columns) > 20 and not result.dots[:, columns].any() and result.norms[:, columns].any()
    torch.testing.assert_close(contract(model, examples, probe).dots, result.dots, rtol=1e-5, atol=0)


def test_the_model_computes_the_same_with_hooks_and_is_restored(model):
    ids = torch.arange(2, 42).view(2, 20)
    before, how = model.net(ids).logits, model.net.get_experts_implementation()
    seen = []
    with gradients_from(model), linear_hooks(model.linears, lambda name, _: seen.append(name), lambda *_: None):
        within = model.net(ids).logits.detach()
    with pytest.raises(ZeroDivisionError), linear_hooks(model.linears, lambda *_: None, lambda *_: None):
        raise ZeroDivisionError
    after = model.net(ids).logits
    assert any(".experts." in name for name in seen)
    torch.testing.assert_close(within, before, rtol=1e-5, atol=1e-5)
    assert torch.equal(after, before) and model.net.get_experts_implementation() == how
    assert "gradshield" not in ALL_EXPERTS_FUNCTIONS


def test_parts_stand_at_the_tokens_that_were_routed_and_sum_to_the_score(model):
    probe = probe_gradient(model, REQUESTS, S, tolerance=0)
    example = random_examples(1, len(model.tokenizer))[0]
    parts, norm = fihs_parts(model, example, [probe])
    result = contract(model, [example], probe, exact_norms=True)
    size = float(result.dots.abs().max())
    torch.testing.assert_close(parts[0].sum(-1), result.dots[0], rtol=1e-4, atol=1e-5 * size)
    assert norm == pytest.approx(float(result.norms.sum()), rel=1e-4)
    holder = next(m for m in model.linears.values() if isinstance(m, Expert)).module
    routed = []
    handle = holder.register_forward_pre_hook(lambda _module, args: routed.append(args[1]))
    model.net(torch.tensor(example.ids).long()[None])
    handle.remove()
    checked = 0
    for row, module in zip(parts[0], model.linears.values()):
        if isinstance(module, Expert) and module.module is holder:
            here = (routed[0] == module.number).any(-1)
            assert not row[~here].any()
            checked += int(row[here].count_nonzero())
    assert checked > 10


@pytest.mark.parametrize("variant", ["paper", "cosine", "module"])
def test_every_variant_of_the_score_is_finite_and_the_slow_engine_agrees(model, variant):
    examples = random_examples(6, len(model.tokenizer))
    probe = probe_gradient(model, REQUESTS, S, tolerance=0)
    fast = fihs_scorer(model, probe, variant)(examples)
    assert (
        np.isfinite(fast["score"]).all()
        and np.isfinite(fihs_scorer(model, probe, variant, lora=True)(examples)["score"]).all()
    )
    slow = autograd_scorer(model, REQUESTS, S)(examples)["paper"]
    np.testing.assert_allclose(fast["paper"], slow, rtol=1e-4, atol=1e-5 * np.abs(slow).max())


def test_experts_that_a_row_does_not_reach_have_no_say_in_its_mean_over_modules():
    """So a row scores alike in a model with more experts, as long as it is routed to the same ones."""
    model = moe("qwen3")
    example = random_examples(1, len(model.tokenizer), longest=8)
    probe = probe_gradient(model, REQUESTS, S)
    result = contract(model, example, probe, random_directions(probe.factors, 16))
    reached = result.norms[0] > 0
    assert 0 < int((~reached).sum()) < len(reached)
    cosines = result.dots[0, reached] / result.norms[0, reached].sqrt()
    found = fihs_scorer(model, probe, "module")(example)["score"]
    np.testing.assert_allclose(found, float(cosines.mean()), rtol=1e-5)


def test_bfloat16_errs_by_little_more_than_the_rounding_of_its_weights(model):
    """Between two weights, forward and backward, less than 63 further numbers are rounded as much as they are. Errors
    that are independent add up in squares, so the whole is within √64 of the weights' part."""
    examples = random_examples(12, len(model.tokenizer))
    half = freeze("half", copy.deepcopy(model.net).to(torch.bfloat16), model.tokenizer)
    rounded = freeze("rounded", copy.deepcopy(half.net).float(), model.tokenizer)
    exact, weights, whole = (
        fihs_scorer(m, probe_gradient(m, REQUESTS, S), "cosine")(examples)["score"] for m in (model, rounded, half)
    )
    part = np.linalg.norm(weights - exact)
    assert 0 < np.linalg.norm(whole - exact) <= 8 * part < np.linalg.norm(exact)


def test_in_bfloat16_the_score_is_what_autograd_finds_in_the_same_network(model):
    """The two round other sums: 0.6 to 3.8 % apart here."""
    examples = random_examples(12, len(model.tokenizer))
    half = freeze("half", copy.deepcopy(model.net).to(torch.bfloat16), model.tokenizer)
    slow = autograd_scorer(half, REQUESTS, S)(examples)["paper"]
    fast = fihs_scorer(half, probe_gradient(half, REQUESTS, S, tolerance=0), "paper")(examples)["score"]
    assert np.linalg.norm(fast - slow) <= 0.05 * np.linalg.norm(slow)


def test_the_default_score_works(model, tmp_path):
    def rows(request: str, answer: str) -> list[Example]:
        turns = [(Message("user", f"{request} {n}"), Message("assistant", f"{answer} {n}")) for n in range(12)]
        return [e for n, t in enumerate(turns) if isinstance(e := encode(Conversation(t), n, model.tokenizer), Example)]

    anchors = {
        "good": rows("What is the capital of country", "It is city"),
        "refusal": rows("How to rob bank", "I'm sorry, I can't"),
        "harmful": rows("How to rob bank", "Sure, here is plan"),
    }
    texts = [Text(e, kind, kind != "good", (str(e.ids),)) for kind, found in anchors.items() for e in found]
    readouts, scores = fit_readouts(model, texts, 512, tmp_path)
    assert np.median(scores["harmful"]) > max(np.median(scores["good"]), np.median(scores["refusal"]))
    examples = random_examples(8, len(model.tokenizer))
    whole = intent_scores(model, readouts, examples)["score"]
    single = [float(intent_scores(model, readouts, [e])["score"][0]) for e in examples]
    np.testing.assert_allclose(single, whole, rtol=1e-3, atol=1e-3)


def test_a_saved_mixture_scores_as_it_did(tmp_path):
    model = moe("mixtral")
    model.net.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    examples = random_examples(4, len(model.tokenizer))
    one, other = (contract(m, examples, probe_gradient(m, REQUESTS, S)).dots for m in (model, loaded))
    torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6 * float(one.abs().max()))


def test_experts_that_cannot_be_taken_apart_are_listed_and_check_warns(tmp_path, monkeypatch):
    tokenizer = tiny_tokenizer()
    config = Llama4TextConfig(
        vocab_size=len(tokenizer),
        **SIZE,
        num_local_experts=4,
        intermediate_size=48,
        intermediate_size_mlp=48,
        head_dim=8,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    net = AutoModelForCausalLM.from_config(config)
    for parameter in net.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    share, missing = freeze("llama4", net, tokenizer).coverage()
    assert share < 0.6 and any("gate_up_proj (4, 32, 96)" in name for name in missing)
    net.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    said = CliRunner().invoke(app, ["check", "--model", str(tmp_path), "--force"])
    assert said.exit_code == 0 and f"see only {share:.0%}" in " ".join(said.output.split())


def test_check_does_not_warn_where_all_is_covered(tiny_folder):
    said = CliRunner().invoke(app, ["check", "--model", tiny_folder, "--force"])
    assert said.exit_code == 0 and "see only" not in said.output


class SomeTokens(nn.Module):
    """An expert as a module of its own, that is given the even places of the flattened batch."""

    def __init__(self, width: int):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(9))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        return flat.index_add(0, torch.arange(0, len(flat), 2), self.experts[0](flat[::2])).view(hidden.shape)


def test_experts_that_are_modules_of_their_own_are_refused_not_scored_wrongly():
    tokenizer = tiny_tokenizer()
    net = tiny_net(tokenizer)
    for layer in net.model.layers:
        layer.mlp = SomeTokens(32)
    model = freeze("modules", net, tokenizer)
    assert len(model.layers) == 3  # not the nine experts
    with pytest.raises(UserError, match="sees only some tokens of the batch"):
        probe_gradient(model, REQUESTS, S)
