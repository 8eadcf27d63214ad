"""Fine-tuning leaves the model as it was, saves what loads again, and goes on where it was stopped."""

import json

import pytest
import torch
from conftest import random_examples
from safetensors.torch import load_file

from gradshield.errors import UserError
from gradshield.finetune import finetune
from gradshield.model import load_model
from gradshield.settings import FinetuneSettings

FAST = {"learning_rate": 1e-2, "epochs": 3, "batch": 4}


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_model_is_left_as_it_was_and_what_is_saved_differs(tiny_folder, tmp_path, method):
    model = load_model(tiny_folder)
    examples = random_examples(8, len(model.tokenizer))
    before = {name: weight.clone() for name, weight in model.net.state_dict().items()}
    figures = finetune(model, examples, tmp_path / "out", FinetuneSettings(method=method, **FAST))
    assert figures["steps"] == 6 and figures["loss"] > 0
    after = model.net.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert not any(w.requires_grad for w in model.net.parameters())
    trained = load_model(str(tmp_path / "out"))
    assert any(not torch.equal(before[k], w) for k, w in trained.net.state_dict().items() if k in before)
    assert not (tmp_path / "out" / "checkpoints").exists()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_stopped_in_the_middle_it_ends_with_the_same_weights(tiny_folder, tmp_path, method, monkeypatch):
    from transformers import Trainer

    model = load_model(tiny_folder)
    examples = random_examples(8, len(model.tokenizer))
    settings = FinetuneSettings(method=method, **FAST)
    finetune(model, examples, tmp_path / "whole", settings)
    real, steps = Trainer.training_step, []

    def dying(self, *args, **kwargs):
        steps.append(1)
        if len(steps) == 4:  # in the second epoch
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", dying)
    with pytest.raises(KeyboardInterrupt):
        finetune(model, examples, tmp_path / "cut", settings)
    saved = list((tmp_path / "cut" / "checkpoints").glob("checkpoint-*"))
    assert saved and not any(w.requires_grad for w in model.net.parameters())
    torn = tmp_path / "cut" / "checkpoints" / "checkpoint-4"  # as a kill in the middle of saving leaves it
    torn.mkdir()
    (torn / "trainer_state.json").write_text('{"epoch"')
    finetune(model, examples, tmp_path / "cut", settings)
    assert len(steps) == 4 + 4  # steps of the first epoch are not done again
    name = "adapter_model.safetensors" if method == "lora" else "model.safetensors"
    one, other = (load_file(tmp_path / f / name) for f in ("whole", "cut"))
    assert all(torch.allclose(one[k], other[k], atol=1e-6) for k in one)


def test_a_diverged_run_saves_nothing(tiny_folder, tmp_path):
    model = load_model(tiny_folder)
    with pytest.raises(UserError, match="diverged"):
        finetune(
            model, random_examples(8, len(model.tokenizer)), tmp_path / "out", FinetuneSettings(learning_rate=1e30)
        )
    assert not list(tmp_path.rglob("*.safetensors"))


def test_out_of_memory_goes_on_with_fewer_rows_at_once(tiny_folder, tmp_path, monkeypatch):
    from transformers import Trainer

    real, sizes = Trainer.training_step, []

    def small(self, model, inputs, *args, **kwargs):
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 1:
            raise torch.OutOfMemoryError("no")
        return real(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", small)
    model = load_model(tiny_folder)
    figures = finetune(model, random_examples(4, len(model.tokenizer)), tmp_path / "out", FinetuneSettings(**FAST))
    assert sizes[:2] == [4, 2] and set(sizes[2:]) == {1} and figures["steps"] == 3


def test_the_adapters_config_names_its_base(tiny_folder, tmp_path):
    model = load_model(tiny_folder)
    finetune(model, random_examples(4, len(model.tokenizer)), tmp_path, FinetuneSettings(epochs=1))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == model.name
