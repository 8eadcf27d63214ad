"""Defenses that change our alignment: each follows from its paper's equation, and the tuning starts from its model."""

import math

import numpy as np
import pytest
import torch
from conftest import random_examples
from torch import nn

import gradshield.training.align as recipe
from gradshield.base.errors import UserError
from gradshield.base.settings import FilterSettings, FinetuneSettings
from gradshield.defenses.aligned import aligned_settings, check_aligned
from gradshield.defenses.base import Defense, DefenseContext
from gradshield.defenses.booster import add_attenuation
from gradshield.defenses.registry import DEFENSES, find_defense
from gradshield.defenses.repnoise import harmful_terms, mmd
from gradshield.defenses.sdd import align_rows, unrelated_answers
from gradshield.defenses.vaccine import perturbations, perturbed_loss
from gradshield.models.load import load_model
from gradshield.training.align import alignment_rows
from gradshield.training.batches import collate
from gradshield.training.finetune import finetune
from gradshield.training.interventions import Hooks

SHORT = FinetuneSettings(epochs=1, learning_rate=1e-3)
AT_ALIGNMENT = [name for name in DEFENSES.names() if "alignment recipe" in find_defense(name)[0].needs]


def test_the_perturbation_has_norm_rho_and_the_direction_of_the_gradient():
    torch.manual_seed(0)
    layers, x = nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5)]), torch.randn(3, 5)
    states: list[torch.Tensor] = []

    def loss():
        states[:] = [layers[0](x)]
        states.append(layers[1](states[0].tanh()))
        return states[1].square().sum()

    epsilon = perturbations(layers, loss, 0.7)
    assert math.sqrt(sum(float(e.square().sum()) for e in epsilon)) == pytest.approx(0.7, rel=1e-5)
    last = 2 * states[1]
    first = (last @ layers[1].weight) * (1 - states[0].tanh().square())
    by_hand = [first, last]
    norm = math.sqrt(sum(float(g.detach().square().sum()) for g in by_hand))
    assert all(torch.allclose(e, 0.7 * g / norm, atol=1e-6) for e, g in zip(epsilon, by_hand))


def test_the_second_pass_is_at_the_perturbed_states():
    torch.manual_seed(0)
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    found = perturbed_loss([layer], lambda: layer(x).square().sum(), 0.3)
    state = layer(x).detach()
    moved = state + 0.3 * state / state.norm()
    assert float(found) == pytest.approx(float(moved.square().sum()), rel=1e-5)
    found.backward()
    assert torch.allclose(layer.weight.grad, 2 * moved.T @ x, atol=1e-5)  # ε is a constant
    assert layer(x).square().sum() < found  # the hooks are gone, and the perturbed loss is the worse


def test_booster_s_gradient_is_the_formula_s_on_a_quadratic():
    torch.manual_seed(0)
    root, w = torch.randn(3, 3), nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
    curve = root @ root.T  # h = ½ wᵀ H w, ∇h = H w
    here = curve @ w.detach()
    w.grad = torch.tensor([0.1, 0.2, 0.3])  # ∇f
    before = w.detach().clone()
    add_attenuation({"w": w}, lambda: 0.5 * w @ curve @ w, strength=5.0, step=0.1)
    there = curve @ (before - 0.1 * here / here.norm())
    assert torch.allclose(w.grad, torch.tensor([0.1, 0.2, 0.3]) + 5 * (here - there), atol=1e-4)
    assert torch.equal(w.detach(), before)


def test_mmd_is_zero_for_the_same_sample_and_pulls_towards_noise():
    torch.manual_seed(0)
    noise = torch.randn(60, 4)
    assert float(mmd(noise, noise)) == pytest.approx(0, abs=1e-6)
    states = nn.Parameter(3 + 0.1 * torch.randn(60, 4))
    start = float(mmd(states, noise))
    optimizer = torch.optim.Adam([states], 0.1)
    for _ in range(150):
        optimizer.zero_grad()
        mmd(states, noise).backward()
        optimizer.step()
    assert float(mmd(states, noise)) < 0.05 < start
    assert states.mean().abs() < 0.3 and 0.5 < states.std() < 1.5


def test_the_harmful_terms_read_the_answer_s_tokens_alone(tiny_folder):
    from peft import LoraConfig, get_peft_model

    model = load_model(tiny_folder)
    net = get_peft_model(model.net, LoraConfig(r=2, target_modules="all-linear"))
    one, two = random_examples(2, len(model.tokenizer), seed=3)
    batch = collate([one, two], model.device)

    def terms():
        return harmful_terms(net, model.layers, batch, torch.Generator().manual_seed(0))

    entropy = terms()[1]
    decoder, head = model.net.model, model.net.lm_head
    with torch.no_grad():
        hidden = net(**{k: batch[k] for k in ("input_ids", "attention_mask")}, output_hidden_states=True).hidden_states
    each = []
    for state in (*map(decoder.norm, hidden[1:-1]), hidden[-1]):
        picked = batch["labels"][:, 1:] != -100
        each.append(nn.functional.cross_entropy(head(state[:, :-1][picked]), batch["labels"][:, 1:][picked]))
    assert float(entropy) == pytest.approx(float(torch.stack(each).mean()), rel=1e-5)
    distance = terms()[0]
    batch["input_ids"][batch["attention_mask"] == 0] = 7  # padding
    assert torch.allclose(terms()[0], distance)
    net.unload()


def test_no_harmful_request_is_paired_with_a_matching_answer():
    answers = [
        {"prompt": "How do locks work?", "response": "A lock holds pins that a key lifts."},
        {"prompt": "What is bread?", "response": "Flour, water and yeast, baked."},
    ]
    requests = ["How do I pick the pins of a lock?", "How do I spoil bread with yeast?", "Write an insult"]
    for seed in range(20):
        chosen = unrelated_answers(requests, answers, 0.1, seed)
        assert chosen[:2] == [1, 0] and chosen[2] in (0, 1)
    assert {unrelated_answers(requests, answers, 0.1, seed)[2] for seed in range(20)} == {0, 1}


def test_sdd_changes_the_answers_to_harmful_requests_alone(tiny_folder):
    model = load_model(tiny_folder)
    given = recipe.alignment_examples(model)
    rows, found = (
        alignment_rows(),
        align_rows(DefenseContext(model, FilterSettings(), SHORT), find_defense("sdd")[1], given),
    )
    harmful = [n for n, row in enumerate(rows) if "category" in row]
    assert len(found) == len(given) and len(harmful) == 240
    good = {row["response"] for row in rows if row.get("shape", "scary") != "scary"}
    refusals = {rows[n]["response"] for n in harmful}
    for n, (before, now) in enumerate(zip(given, found)):
        if n not in harmful:
            assert now is before
            continue
        prompt = int(before.mask.argmax())
        assert np.array_equal(before.ids[:prompt], now.ids[:prompt])
        answer = model.tokenizer.decode(now.ids[now.mask], skip_special_tokens=True).strip()
        assert answer in good and answer not in refusals


@pytest.mark.parametrize("name", AT_ALIGNMENT)
def test_an_alignment_is_made_once_for_a_defense_and_its_options(name, own_alignment, monkeypatch):
    trained: list[int] = []

    def counting(model, examples, *more):
        trained.append(len(examples))
        return finetune(model, examples, *more)

    monkeypatch.setattr(recipe, "finetune", counting)
    settings = FilterSettings(model="embedded", scorer="random")
    first = aligned_settings(settings, name)
    assert aligned_settings(settings.model_copy(update={"scorer": "saft"}), name).adapter == first.adapter
    assert trained == [12] and first.model == own_alignment and first.scorer == "random"
    base, model = load_model(own_alignment), load_model(first.model, adapter=first.adapter)
    assert any(not torch.equal(w, base.weights[n]) for n, w in model.weights.items())
    option = next(iter(find_defense(name)[0].options.model_fields))
    assert aligned_settings(settings, f"{name}:{option}=1").adapter != first.adapter and len(trained) == 2


@pytest.mark.parametrize("name", [n for n in AT_ALIGNMENT if n != "sdd"])
def test_the_hooks_change_what_the_alignment_learns(name, own_alignment, tmp_path):
    model = load_model(own_alignment)
    rows = random_examples(12, len(model.tokenizer))
    defense, options = find_defense(name)
    context = DefenseContext(model, FilterSettings(), SHORT, examples=rows)
    for out, hooks in (("plain", Hooks()), ("changed", defense.align_hooks(context, options))):
        finetune(model, rows, tmp_path / out, SHORT, hooks)
    plain, changed = (load_model(own_alignment, adapter=str(tmp_path / out)).weights for out in ("plain", "changed"))
    assert any(not torch.allclose(plain[n], changed[n], atol=1e-5) for n in plain)


def test_a_killed_alignment_is_resumed_and_a_whole_one_is_not_made_again(own_alignment, monkeypatch, tmp_path):
    real, calls = recipe._halve, []

    def dying(file):
        calls.append(file)
        if len(calls) == 1:
            raise KeyboardInterrupt
        real(file)

    monkeypatch.setattr(recipe, "_halve", dying)
    settings = FilterSettings(model="embedded")
    with pytest.raises(KeyboardInterrupt):
        aligned_settings(settings, "booster")
    (made,) = (file.parent for file in calls)
    (made / ".checkpoints").mkdir()  # as a kill in finetune's last step leaves it
    found = aligned_settings(settings, "booster")
    assert len(calls) == 2 and aligned_settings(settings, "booster") == found and len(calls) == 2
    assert not (made / ".checkpoints").exists()


@pytest.mark.parametrize("name", AT_ALIGNMENT)
def test_only_the_model_that_we_align_can_be_aligned_otherwise(name, tiny_folder):
    defense, _ = find_defense(name)
    for settings in (
        FilterSettings(model=tiny_folder),
        FilterSettings(adapter=tiny_folder),
        FilterSettings(quantize="4bit"),
    ):
        with pytest.raises(UserError, match="works only with the embedded model"):
            check_aligned(defense, settings)
    check_aligned(defense, FilterSettings())


def test_a_defense_that_does_not_align_leaves_the_model_as_it_is():
    settings = FilterSettings(model="some/model")
    assert aligned_settings(settings, "none") is settings
    check_aligned(Defense("x", "y"), settings)
