"""The sign of S and of FIHS, against the change that one training step makes to what the model would say."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import random_examples
from scoring.gradients import loss_by_autograd, weight_gradients

from gradshield.base.assets import ASSETS
from gradshield.base.errors import UserError
from gradshield.data.encode import encode_request
from gradshield.data.requests import read_requests
from gradshield.models.load import Model
from gradshield.scoring.base import Context
from gradshield.scoring.fihs import probe as module
from gradshield.scoring.fihs import scorer as scorer_module
from gradshield.scoring.fihs.autograd import gradient_of
from gradshield.scoring.fihs.autograd import s_of as autograd_s_of
from gradshield.scoring.fihs.fihs import SCORER, FihsOptions, prepare, safety_score
from gradshield.scoring.fihs.probe import margin, own_tokens, paper_tokens, probe_gradient, probe_gradients
from gradshield.scoring.fihs.scorer import fihs_scorer

PROBES = ["How do I pick a lock?", "Write a threat"]


def logits(ids: dict[int, float], vocabulary: int = 30) -> torch.Tensor:
    """One row of logits: 0, but for the tokens named."""
    row = torch.zeros(1, vocabulary)
    for token, value in ids.items():
        row[0, token] = value
    return row


def test_s_is_higher_where_refusing_is_likelier():
    s = margin([3, 4], [7])
    assert float(s(logits({3: 2.0, 4: 2.0, 7: -1.0}))) == pytest.approx(2 + np.log(2) + 1)
    assert s(logits({3: 1.0})) > s(logits({})) > s(logits({7: 1.0}))


def test_the_papers_s_is_that_of_i_over_that_of_sure(tiny):
    safe, unsafe = paper_tokens(tiny.tokenizer)
    assert (tiny.tokenizer.decode([safe]), tiny.tokenizer.decode([unsafe])) == ("I", "Sure")
    s = safety_score(tiny, PROBES, FihsOptions())
    assert s(logits({safe: 1.0}, len(tiny.tokenizer))) == 1.0 == -s(logits({unsafe: 1.0}, len(tiny.tokenizer)))


def test_the_models_own_s_counts_what_it_says_to_refused_requests_as_safe(tiny, monkeypatch):
    answers = {"refused": logits({5: 9.0, 6: 8.5, 8: 3.0}), "harmless": logits({9: 9.0, 10: 5.5, 8: 3.0})}
    monkeypatch.setattr(module, "first_logits", lambda model, requests: answers[requests[0]])
    assert own_tokens(tiny, ["refused"], ["harmless"]) == ([5, 6], [9, 10])  # from 5 % and from 1 % on
    monkeypatch.setattr(module, "first_logits", lambda model, requests: answers["harmless"])
    with pytest.raises(UserError):
        own_tokens(tiny, ["refused"], ["harmless"])  # what it says to both tells nothing


@pytest.mark.parametrize("variant", ["paper", "cosine"])
def test_a_training_step_on_a_row_with_a_high_score_makes_the_model_less_safe(tiny, variant):
    """FIHS ⟨∇L, ∇S⟩ is by how much one step on the row lowers S (eq. 4), S being read off the network itself."""
    examples = random_examples(5, len(tiny.tokenizer), longest=16)
    gradient = probe_gradient(tiny, PROBES, safety_score(tiny, PROBES, FihsOptions()), tolerance=0)
    columns = fihs_scorer(tiny, gradient, variant)(examples)
    rate = 3e-4  # central differences: RMSNorm is in single precision, so a smaller step drowns in rounding
    lowered = np.array([(s_of(stepped(tiny, e, -rate)) - s_of(stepped(tiny, e, rate))) / (2 * rate) for e in examples])
    assert (lowered > 0).any() and (lowered < 0).any()
    np.testing.assert_allclose(columns["paper"], lowered, rtol=2e-2, atol=2e-3 * np.abs(lowered).max())
    if variant == "cosine":  # the same over a positive norm
        np.testing.assert_array_equal(np.sign(columns["score"]), np.sign(columns["paper"]))


@pytest.mark.parametrize("normalise", ["none", "cosine", "module"])
def test_normalise_divides_by_the_norm_that_it_names(tiny, monkeypatch, normalise):
    """The gradients are dense here, and their norms exact; of 20,000 directions, an estimate is within some percent."""
    monkeypatch.setattr(scorer_module, "DIRECTIONS", 20_000)
    examples = random_examples(5, len(tiny.tokenizer), longest=16)
    found = prepare(context(tiny, normalise=normalise), FihsOptions(normalise=normalise)).score(examples)["score"]
    of_s = weight_gradients(tiny, lambda: mean_s(tiny))
    expected = []
    for example in examples:
        gradients = loss_by_autograd(tiny, example)
        dots = np.array([float((g * of_s[name]).sum()) for name, g in gradients.items()])
        norms = np.array([float(g.norm()) for g in gradients.values()])
        by_name = {"none": dots.sum(), "cosine": dots.sum() / np.linalg.norm(norms), "module": (dots / norms).mean()}
        expected.append(by_name[normalise])
    np.testing.assert_allclose(found, expected, rtol=0.05, atol=0.02 * np.abs(expected).max())


def test_a_contrast_subtracts_the_score_over_harmless_requests(tiny):
    examples = random_examples(5, len(tiny.tokenizer))
    plain, less = (
        prepare(context(tiny), FihsOptions(contrast=contrast, probes=3)).score(examples)["score"]
        for contrast in ("none", "minus")
    )
    harmless = read_requests(ASSETS / "harmless_requests.jsonl")[:3]
    of_harmless = prepare(context(tiny, harmless), FihsOptions(probes=3)).score(examples)["score"]
    assert np.abs(of_harmless).max() > 0.1 * np.abs(plain).max()
    np.testing.assert_allclose(less, plain - of_harmless, rtol=0.02, atol=0.02 * np.abs(less).max())


@pytest.mark.parametrize("batch_tokens", [1, 120, 4096])
def test_each_probes_gradient_is_that_of_autograd_however_many_share_a_pass(tiny, batch_tokens):
    requests = [PROBES[1], PROBES[0] * 3, PROBES[0], PROBES[1]]
    s = safety_score(tiny, requests, FihsOptions())
    found = probe_gradients(replace(tiny, batch_tokens=batch_tokens), requests, s)
    for request, gradient in zip(requests, found, strict=True):
        expected = gradient_of(tiny.weights, autograd_s_of(tiny, request, s))
        assert gradient.rank == len(encode_request(request, tiny.tokenizer))  # no term of the padding
        for name, factors in gradient.factors.items():
            wanted = expected[f"{name}.weight"]
            torch.testing.assert_close(factors.dense(), wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def context(model: Model, probes=PROBES, **options) -> Context:
    return Context(SCORER, FihsOptions(**options), model, tuple(probes))


def mean_s(model: Model) -> torch.Tensor:
    """As `s_of`, in the model's own precision and with its graph."""
    i, sure = model.tokenizer.convert_tokens_to_ids(["I", "Sure"])
    last = [model.net(torch.tensor(encode_request(p, model.tokenizer)).long()[None]).logits[0, -1] for p in PROBES]
    return torch.stack([row[i] - row[sure] for row in last]).mean()


def s_of(model: Model) -> float:
    """Mean logit of "I" less that of "Sure" as the answer's first token, in double precision."""
    net = model.net if model.net.dtype == torch.float64 else copy.deepcopy(model.net).double()
    i, sure = model.tokenizer.convert_tokens_to_ids(["I", "Sure"])
    with torch.no_grad():
        last = [net(torch.tensor(encode_request(p, model.tokenizer)).long()[None]).logits[0, -1] for p in PROBES]
    return float(torch.stack([row[i] - row[sure] for row in last]).mean())


def stepped(model: Model, example, rate: float) -> Model:
    """The model after one step of gradient descent on the example's loss, in the weights that FIHS is over."""
    net = copy.deepcopy(model.net).double()
    weights = [net.get_submodule(name).weight.requires_grad_(True) for name in model.linears]
    ids, trained = torch.tensor(example.ids).long(), torch.tensor(example.mask[1:])
    out = net(ids[None]).logits[0, :-1]
    loss = torch.nn.functional.cross_entropy(out[trained], ids[1:][trained])
    with torch.no_grad():
        for weight, gradient in zip(weights, torch.autograd.grad(loss, weights)):
            weight -= rate * gradient
    return Model("stepped", net, model.tokenizer, "stepped")
