"""SaLoRA: its projection, where its adapter starts, and what it adds."""

from dataclasses import replace

import pytest
import torch
from conftest import random_examples

from gradshield.base.settings import FilterSettings, FinetuneSettings
from gradshield.defenses import salora
from gradshield.defenses.base import DefenseContext
from gradshield.models.load import load_model
from gradshield.training.batches import collate, log_probs
from gradshield.training.finetune import finetune
from gradshield.training.lora import lora_layers

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


def test_the_projection_annihilates_a_planted_subspace_and_keeps_the_rest():
    rng = torch.Generator().manual_seed(0)
    planted = torch.linalg.qr(torch.randn(20, 3, generator=rng))[0]
    outputs = planted @ torch.randn(3, 50, generator=rng)
    safety = salora.left_singular_vectors(outputs, 3)
    assert salora.apply_projection(safety, outputs).abs().max() < 1e-4
    aside = torch.linalg.qr(torch.cat([planted, torch.randn(20, 2, generator=rng)], 1))[0][:, 3:]
    assert torch.allclose(salora.apply_projection(safety, aside), aside, atol=1e-5)
    once = salora.apply_projection(safety, torch.randn(20, 4, generator=rng))
    assert torch.allclose(salora.apply_projection(safety, once), once, atol=1e-5)


def test_the_adapter_starts_at_the_weight_s_first_directions_within_the_task_s():
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 3, generator=rng) @ torch.randn(3, 10, generator=rng)
    task = torch.linalg.qr(torch.randn(12, 5, generator=rng))[0]
    b, a = salora.initial_factors(weight, task, 3, scale=4.0)
    assert b.shape == (12, 3) and a.shape == (3, 10)
    assert torch.allclose(4 * b @ a, task @ task.T @ weight, atol=1e-4)


def test_salora_reads_128_safe_rows_and_as_many_of_the_user_s(context, monkeypatch):
    read = []
    monkeypatch.setattr(salora, "lora_layers", lambda net: [])
    monkeypatch.setattr(salora, "read_inputs_of", lambda context, layers, rows: read.append(len(rows)) or [])
    salora.hooks(replace(context, examples=random_examples(300, 200)), salora.Options()).adapt(torch.nn.Linear(1, 1))
    assert read == [128, 128]


def test_salora_starts_as_the_model_and_adds_nothing_along_the_directions_of_safety(model, examples, context, tmp_path):
    options = salora.Options(count=4, safety_rank=6)
    hooks, batch, said = salora.hooks(context, options), collate(examples, model.device), {}

    def adapt(net):
        hooks.adapt(net)
        said["start"] = log_probs(net, batch).detach()

    def finish(net):
        said["end"] = log_probs(net, batch)
        hooks.finish(net)
        for layer in lora_layers(net):
            safety = hooks.state[f"{layer.name}.safety"]
            added = layer.b.weight @ layer.a.weight
            said[layer.name] = float((safety.T @ added).abs().max() / added.abs().max())
            assert safety.shape[1] == 6 and layer.a.weight.shape[0] == 16

    finetune(model, examples, tmp_path, TRAINING, replace(hooks, adapt=adapt, finish=finish))
    assert torch.allclose(said.pop("start"), log_probs(model.net, batch), atol=1e-4)
    loaded = log_probs(load_model(model.name, adapter=str(tmp_path)).net, batch)
    assert torch.allclose(said.pop("end"), loaded, atol=1e-4)
    assert len(said) == 3 * 7 and max(said.values()) < 1e-5
