"""Defenses that change the fine-tuning: each does what its paper's equations say."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import random_examples
from safetensors.torch import load_file
from transformers import Trainer

from gradshield.base.errors import UserError
from gradshield.base.settings import FilterSettings, FinetuneSettings
from gradshield.data.encode import encode_request
from gradshield.defenses import backdooralign, lisa
from gradshield.defenses.base import Context
from gradshield.defenses.registry import find_defense
from gradshield.defenses.train import train_defended, with_prompt
from gradshield.models.load import load_model

TRAINING = FinetuneSettings(epochs=1, learning_rate=1e-2)


@pytest.fixture(scope="module")
def model(tiny_folder):
    return load_model(tiny_folder)


@pytest.fixture(scope="module")
def examples(model):
    return random_examples(12, len(model.tokenizer))


@pytest.fixture(scope="module")
def context(model, examples):
    return Context(model, FilterSettings(), TRAINING, examples=examples)


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


def test_the_secret_has_the_given_length_and_follows_from_the_key_and_the_seed(context, model):
    def secret(seed=0, **options):
        changed = replace(context, training=TRAINING.model_copy(update={"seed": seed}))
        return backdooralign.secret(changed, backdooralign.Options(**options))

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


def test_lisa_stopped_in_the_middle_ends_with_the_same_weights(context, examples, model, tmp_path, monkeypatch):
    settings = FinetuneSettings(epochs=4, learning_rate=1e-2)  # eight steps, two an epoch
    name = "lisa:safe_steps=1,user_steps=3,count=8,warmup=0"

    def train(folder):
        train_defended(model, examples, tmp_path / folder, settings, FilterSettings(), name)

    train("whole")
    real, steps = Trainer.training_step, []

    def dying(self, *args, **kwargs):
        steps.append(1)
        if len(steps) == 8:  # in the fourth epoch: the last switch lies in the third
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", dying)
    with pytest.raises(KeyboardInterrupt):
        train("cut")
    train("cut")
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(np.allclose(one[name], other[name], atol=1e-6) for name in one)
