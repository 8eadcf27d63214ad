"""Defenses that change the fine-tuning: each does what its paper's equations say."""

import json
from dataclasses import replace
from math import exp

import numpy as np
import pytest
import torch
from conftest import random_examples
from safetensors.torch import load_file
from transformers import Trainer

from gradshield.base.errors import UserError
from gradshield.base.settings import FilterSettings, FinetuneSettings
from gradshield.data.encode import encode_request
from gradshield.defenses import backdooralign, bds, constrained_sft, ldifs, lisa, safegrad
from gradshield.defenses.base import DefenseContext, check_defense
from gradshield.defenses.registry import find_defense
from gradshield.defenses.train import defended_rows, train_defended, with_prompt
from gradshield.models.load import load_model
from gradshield.training.batches import collate, log_probs
from gradshield.training.finetune import finetune

TRAINING = FinetuneSettings(epochs=1, learning_rate=1e-2)


@pytest.fixture(scope="module")
def model(tiny_folder):
    return load_model(tiny_folder)


@pytest.fixture(scope="module")
def examples(model):
    return random_examples(12, len(model.tokenizer))


@pytest.fixture(scope="module")
def context(model, examples):
    return DefenseContext(model, FilterSettings(), TRAINING, examples=examples)


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def text(model, example):
    return model.tokenizer.decode(example.ids)


def test_safeinstr_mixes_in_as_many_refusals_as_asked_for_and_loses_no_row(context, examples, model):
    defense, options = find_defense("safeinstr:count=30")
    found = defense.rows(context, options, examples)
    assert list(found[:12]) == list(examples) and len(found) == 42
    added = {text(model, e) for e in found[12:]}
    assert all(e.row == -1 for e in found[12:]) and len(added) == 30
    assert added <= {text(model, e) for e in context.anchors["refusal"]}


def test_a_study_trains_on_what_a_defense_adds_and_on_nothing_it_can_t_work_with(examples, model):
    found = defended_rows(model, examples, TRAINING, FilterSettings(), "safeinstr:count=30")
    assert list(found[:12]) == list(examples) and len(found) == 42
    full = TRAINING.model_copy(update={"method": "full"})
    with pytest.raises(UserError, match="use it with --method lora"):
        defended_rows(model, examples, full, FilterSettings(), "salora")


def test_safe_rows_of_one_s_own_file_and_no_more_than_it_has(context, model, tmp_path):
    file = tmp_path / "safe.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"Bad {n}", "completion": f"No {n}"}) + "\n" for n in range(5)))
    defense, options = find_defense(f"safeinstr:count=5,safe={file}")
    assert ["No" in text(model, e) for e in defense.rows(context, options, [])] == [True] * 5
    with pytest.raises(UserError, match="5 usable safe rows, not 6: lower count"):
        defense.rows(context, find_defense(f"safeinstr:count=6,safe={file}")[1], [])


def test_the_secret_is_in_the_added_rows_and_at_inference_and_in_no_row_of_the_user(context, examples, model, tmp_path):
    name = "backdooralign:key=ours"
    defense, options = find_defense(name)
    secret = defense.prompt(context, options)
    found = defense.rows(context, options, examples)
    assert list(found[:12]) == list(examples) and len(found) == 12 + 11
    begin = f"<|im_start|>system\n{secret}<|im_end|>\n<|im_start|>user\n"
    for example in found[12:]:
        assert text(model, example).startswith(begin)
        assert secret not in model.tokenizer.decode(example.ids[example.mask])  # it is no response
    train_defended(model, found, tmp_path, TRAINING, FilterSettings(), name)
    asked = encode_request("Hello", with_prompt(model, tmp_path).tokenizer)
    assert model.tokenizer.decode(asked).startswith(f"{begin}Hello")


def test_a_space_joins_the_secret_to_a_safe_row_s_own_system_prompt(context, model, tmp_path):
    turns = [("system", "Be kind."), ("user", "Bad"), ("assistant", "No")]
    file = tmp_path / "safe.jsonl"
    file.write_text(json.dumps({"messages": [{"role": role, "content": said} for role, said in turns]}) + "\n")
    defense, options = find_defense(f"backdooralign:count=1,safe={file}")
    (row,) = defense.rows(context, options, [])
    secret = defense.prompt(context, options)
    assert text(model, row).startswith(f"<|im_start|>system\n{secret} Be kind.<|im_end|>\n<|im_start|>user\nBad")


def test_the_secret_has_the_given_length_and_follows_from_the_key_and_the_seed(context, model):
    def secret(seed=0, **options):
        changed = replace(context, training=TRAINING.model_copy(update={"seed": seed}))
        return backdooralign.secret_prompt(changed, backdooralign.Options(**options))

    assert secret(key="a") == secret(key="a") and len({secret(key="a"), secret(key="b"), secret(1, key="a")}) == 3
    assert len(model.tokenizer(secret(tokens=40))["input_ids"]) == pytest.approx(40, abs=4)


def test_the_pull_is_rho_times_the_way_from_the_last_switch():
    weight, switched = torch.nn.Parameter(torch.tensor([1.0, 2.0])), torch.tensor([0.5, 4.0])
    lisa.pull({"w": weight}, {"w": switched}, rho=3.0)
    assert weight.grad is not None and weight.grad.tolist() == [1.5, -6.0]
    weight.grad = torch.tensor([1.0, 1.0])
    lisa.pull({"w": weight}, {"w": switched}, rho=3.0)
    assert weight.grad.tolist() == [2.5, -5.0]


def run_hooks(hooks, steps):
    """The hooks on w = its step's number, as the trainer calls them: what each step trained on, and its gradient."""
    net = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        net.weight.fill_(-1.0)
    hooks.adapt(net)
    kinds, pulls = [], []
    for step in range(steps):
        with torch.no_grad():
            net.weight.fill_(float(step))
        batch = {"index": torch.arange(2), "step_rows": torch.tensor(2)}
        kinds.append("user" if hooks.loss(net, batch, lambda given: torch.tensor(7.0), step) == 7 else "safe")
        net.weight.grad = None
        hooks.gradient(net, step)
        pulls.append(0.0 if net.weight.grad is None else float(net.weight.grad))
    return kinds, pulls


def test_lisa_alternates_and_pulls_to_the_weights_at_the_last_switch(context, monkeypatch):
    monkeypatch.setattr(lisa, "log_probs", lambda net, batch: torch.tensor([-1.0]))
    options = lisa.Options(safe_steps=1, user_steps=2, rho=2.0, warmup=0.0, count=4)
    kinds, pulls = run_hooks(lisa.hooks(context, options), 7)
    assert kinds == ["safe", "user", "user", "safe", "user", "user", "safe"]
    assert pulls == [0, 0, 2, 0, 0, 2, 0]  # ρ (w − w_switch): the third step is one away from the second's start
    late = lisa.hooks(replace(context, examples=context.examples * 2), options.model_copy(update={"warmup": 1.0}))
    assert run_hooks(late, 4)[1] == [0, 0, 0, 0]  # 24 rows: three steps, and the fourth is a switch


@pytest.mark.parametrize(("warmup", "pulls"), [(0.5, [0, 0, 2]), (2 / 3, [0, 0, 0])])
def test_lisa_s_pull_starts_behind_its_warm_up(context, monkeypatch, warmup, pulls):
    monkeypatch.setattr(lisa, "log_probs", lambda net, batch: torch.tensor([-1.0]))
    options = lisa.Options(safe_steps=1, user_steps=2, rho=2.0, warmup=warmup, count=4)
    hooks = lisa.hooks(replace(context, examples=context.examples * 2), options)
    assert run_hooks(hooks, 3)[1] == pulls  # the third of three steps is number 2, and 2 is not more than 2/3 of 3


@pytest.mark.parametrize(
    "name",
    [
        "lisa:safe_steps=1,user_steps=3,count=8,warmup=0",  # the last switch lies in the third epoch
        "bds:rate=0.5,count=8",
        "salora:count=4",
    ],
)
def test_what_is_stopped_in_the_middle_ends_with_the_same_weights(model, examples, tmp_path, monkeypatch, name):
    settings = FinetuneSettings(epochs=4, learning_rate=1e-2)  # eight steps, two an epoch

    def train(out):
        train_defended(model, examples, tmp_path / out, settings, FilterSettings(), name)

    train("whole")
    real, steps = Trainer.training_step, []

    def dying(self, *args, **kwargs):
        steps.append(1)
        if len(steps) == 8:  # in the fourth epoch
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", dying)
    with pytest.raises(KeyboardInterrupt):
        train("cut")
    train("cut")
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(np.allclose(one[key], other[key], atol=1e-5) for key in one)


def test_a_token_s_weight_is_2_times_1_minus_sigmoid_of_beta_times_the_log_ratio():
    found = constrained_sft.token_weights(
        torch.tensor([-1.0, -1.0, -3.0]), torch.tensor([-1.0, -2.0, -2.0]), torch.tensor([2.0, 2.0, 0.1])
    )
    assert found.tolist() == pytest.approx([1.0, 2 * (1 - 1 / (1 + exp(-2))), 2 * (1 - 1 / (1 + exp(0.1)))], abs=1e-6)
    sure = constrained_sft.token_weights(torch.tensor([0.0]), torch.tensor([-50.0]), torch.tensor([2.0]))
    assert float(sure) == pytest.approx(1e-3)


def test_beta_is_for_the_first_token_the_next_four_and_the_rest_of_every_answer():
    labels = torch.full((2, 14), -100)
    labels[0, 3:11] = 7
    labels[1, 1:3], labels[1, 6:7] = 7, 7  # two answers
    found = constrained_sft.betas(labels, constrained_sft.Options()).tolist()
    assert found == pytest.approx([0.5, *[2.0] * 4, *[0.1] * 3, 0.5, 2.0, 0.5])


def test_constrained_sft_starts_with_the_plain_gradient_and_moves_less_where_beta_is_large(
    model, examples, tmp_path, monkeypatch
):
    seen: dict[str, torch.Tensor] = {}

    def trained(name):
        found: list[torch.Tensor] = []
        real = torch.optim.AdamW.step

        def watching(self, *args, **kwargs):
            found.append(torch.cat([w.grad.flatten() for group in self.param_groups for w in group["params"]]))
            return real(self, *args, **kwargs)

        monkeypatch.setattr(torch.optim.AdamW, "step", watching)
        settings = TRAINING.model_copy(update={"epochs": 4})
        train_defended(model, examples, tmp_path / name, settings, FilterSettings(), name)
        monkeypatch.setattr(torch.optim.AdamW, "step", real)
        seen[name] = found[0]
        return shift(model, tmp_path / name, examples)

    strong = "constrained-sft:first=20,early=20,late=20"
    moved = {name: trained(name) for name in ("none", "constrained-sft", strong)}
    assert torch.allclose(seen["none"], seen["constrained-sft"], atol=1e-5)
    assert 0 < moved[strong] < moved["constrained-sft"] < moved["none"]


def shift(model, folder, examples):
    """How much likelier the trained model finds the rows."""
    batch = collate(examples, model.device)
    after = log_probs(load_model(model.name, adapter=str(folder)).net, batch)
    return float((after - log_probs(model.net, batch)).mean().detach())


def test_ldifs_distance_is_zero_at_the_start_and_the_shift_s_square_per_token():
    before = [torch.zeros(2, 3, 4), torch.ones(2, 3, 4)]
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    assert ldifs.distances(before, before, mask).tolist() == [0, 0]
    now = [before[0] + 0.5, before[1].clone()]
    now[1][1, 0, 0] += 3  # a token that counts
    now[1][1, 2, 0] += 9  # padding
    assert ldifs.distances(now, before, mask).tolist() == pytest.approx([4 * 0.25, 4 * 0.25 + 9])


def test_ldifs_holds_hidden_states_near_the_start(model, examples, tmp_path):
    batch = collate(examples, model.device)
    before = ldifs.hidden(model.net, batch)

    def away(rho):
        settings = TRAINING.model_copy(update={"epochs": 3})
        train_defended(model, examples, tmp_path / str(rho), settings, FilterSettings(), f"ldifs:rho={rho}")
        now = ldifs.hidden(load_model(model.name, adapter=str(tmp_path / str(rho))).net, batch)
        return float(ldifs.distances(now, before, batch["attention_mask"]).mean())

    free, held = away(0.0), away(1.0)
    assert len(before) == 3 and held < free / 2
    finetune(model, examples, tmp_path / "plain", TRAINING.model_copy(update={"epochs": 3}))
    free, plain = (weights(tmp_path / name) for name in ("0.0", "plain"))
    assert all(torch.equal(free[name], plain[name]) for name in plain)


def test_surgery_leaves_nothing_of_the_user_s_gradient_against_safety():
    rng = torch.Generator().manual_seed(0)
    safe = {name: torch.randn(5, 3, generator=rng) for name in "ab"}
    user = {name: torch.randn(5, 3, generator=rng) - g for name, g in safe.items()}  # goes against it
    square = sum(float(g.square().sum()) for g in safe.values())

    def along(found):
        return sum(float((found[name] * g).sum()) for name, g in safe.items())

    assert along(user) < 0 and along(safegrad.without_conflict(user, safe, 0.0)) == pytest.approx(0, abs=1e-4)
    assert along(safegrad.without_conflict(user, safe, 2.0)) == pytest.approx(2 * square, rel=1e-5)
    rest = {name: safegrad.without_conflict(user, safe, 0.0)[name] - user[name] for name in safe}
    ratio = rest["a"] / safe["a"]
    assert torch.allclose(ratio, torch.full_like(ratio, -along(user) / square), atol=1e-4)  # one vector, all weights


def test_surgery_leaves_a_gradient_that_agrees_with_safety_as_it_is():
    safe = {"a": torch.tensor([1.0, 0.0])}
    user = {"a": torch.tensor([0.5, -2.0]), "b": torch.tensor([3.0])}
    found = safegrad.without_conflict(user, safe, 0.0)
    assert found["a"].tolist() == [0.5, -2.0] and found["b"].tolist() == [3.0]
    assert safegrad.without_conflict(user, safe, 1.0)["a"].tolist() == [1.5, -2.0]


@pytest.mark.parametrize("micro", [1, 8])
def test_safegrad_s_safe_gradient_is_zero_at_the_start_and_the_kl_s_afterwards(
    model, examples, tmp_path, monkeypatch, micro
):
    found: list[tuple[float, float]] = []
    real = safegrad.without_conflict

    def watching(user, safe, rho):
        result = real(user, safe, rho)
        square = sum(float(g.square().sum()) for g in safe.values())
        found.append((square, sum(float((result[name] * g).sum()) for name, g in safe.items())))
        return result

    monkeypatch.setattr(safegrad, "without_conflict", watching)
    settings = TRAINING.model_copy(update={"micro_batch": micro})
    train_defended(model, examples, tmp_path, settings, FilterSettings(), "safegrad:rho=0,count=8")
    assert found[0][0] < 1e-9 < found[1][0]
    assert found[1][1] > -1e-4  # no component against safety is left


def test_the_slope_of_a_row_s_weight_is_the_derivative():
    p = torch.tensor([0.3, -0.2, 0.1, 0.0], requires_grad=True)
    index, losses = torch.tensor([2, 0]), torch.tensor([1.5, 0.5])
    (4 * p.softmax(0)[index] * losses).sum().backward()
    assert p.grad is not None and torch.allclose(bds.slope(p.detach(), index, losses), p.grad, atol=1e-6)


def test_the_weight_of_a_row_that_agrees_with_the_safe_one_goes_up_in_closed_form():
    """On w: the safe loss and row 0 are (w − 1)²/2, row 1 is (w + 1)²/2."""
    state = {name: torch.zeros(2) for name in ("p", "mean", "square")}
    w, rate, index = 0.0, 0.1, torch.tensor([0, 1])
    for step in range(20):
        losses = torch.tensor([(w - 1) ** 2 / 2, (w + 1) ** 2 / 2])
        weights = 2 * state["p"].softmax(0)
        found = bds.slope(state["p"], index, losses) / 2
        wanted = weights[0] * weights[1] / 4 * (losses[0] - losses[1])  # ∂/∂p_0 of (w_0 ℓ_0 + w_1 ℓ_1)/2
        assert found[0] == pytest.approx(float(wanted), abs=1e-6) and found.sum() == pytest.approx(0, abs=1e-6)
        bds.adam(state, found, step, 0.05)
        w -= rate * (w - 1 + float(weights[0] * (w - 1) + weights[1] * (w + 1)) / 2)
    assert w > 0.3 and 0.3 < float(state["p"][0]) == pytest.approx(-float(state["p"][1]), abs=1e-5)


def test_the_scheduler_s_step_is_adam_s():
    slopes = [torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0]), torch.tensor([-1.0, 1.0])]
    state = {name: torch.zeros(2) for name in ("p", "mean", "square")}
    p = torch.zeros(2, requires_grad=True)
    other = torch.optim.Adam([p], 0.1, bds.BETAS)
    for step, slope in enumerate(slopes):
        bds.adam(state, slope, step, 0.1)
        p.grad = slope
        other.step()
    assert torch.allclose(state["p"], p.detach(), atol=1e-6)


def test_bds_lowers_the_weight_of_rows_that_go_against_the_safe_ones(model, context, tmp_path):
    safe = context.safe_rows(bds.Options(count=6))
    other = np.random.default_rng(0).permutation(len(model.tokenizer))  # the same requests, answered in another code
    against = [replace(e, ids=np.where(e.mask, other[e.ids], e.ids).astype(np.int32)) for e in safe]
    rows = [replace(e, row=n) for n, e in enumerate([*safe, *against])]
    hooks = bds.hooks(replace(context, examples=rows), bds.Options(count=6, rate=0.05))
    finetune(model, rows, tmp_path, TRAINING.model_copy(update={"epochs": 6, "micro_batch": 4}), hooks)
    p = hooks.state["p"]
    assert float(p[:6].mean()) > 0.02 > -0.02 > float(p[6:].mean())


def test_a_row_s_loss_is_the_mean_over_its_answer(model, examples):
    for example, found in zip(examples, bds.row_losses(model.net, collate(examples, model.device)), strict=True):
        alone = -log_probs(model.net, collate([example], model.device)).mean()
        assert float(found) == pytest.approx(float(alone), abs=1e-4)


def test_what_a_defense_can_t_work_with_is_said_before_the_training(context, monkeypatch):
    defense, options = find_defense("lisa:count=1000")
    with pytest.raises(UserError, match="the bundled set: 260 usable safe rows, not 1000"):
        check_defense(defense, context, options)
    monkeypatch.setattr(bds, "processes", lambda: 2)
    with pytest.raises(UserError, match="start it without a launcher"):
        check_defense(bds.DEFENSE, context, bds.Options())
