"""What a hook is given: which rows a batch holds, how many are in its step, the gradient before it is clipped, and
tensors that survive a stop."""

import pytest
import torch
from conftest import random_examples
from safetensors.torch import load_file
from transformers import Trainer

from gradshield.base.settings import FinetuneSettings
from gradshield.models.load import load_model
from gradshield.training.batches import (
    collate,
    draw_batches,
    labelled_rows,
    log_probs,
    network_before_training,
    trained_weights,
)
from gradshield.training.finetune import finetune
from gradshield.training.interventions import Hooks

TRAINING = FinetuneSettings(epochs=1, learning_rate=1e-2)


@pytest.fixture(scope="module")
def model(tiny_folder):
    return load_model(tiny_folder)


@pytest.fixture(scope="module")
def rows(model):
    return random_examples(12, len(model.tokenizer))


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def close(one, other, atol=1e-6):
    return all(torch.allclose(one[name], other[name], atol=atol) for name in one)


@pytest.mark.parametrize("micro", [2, 8])
def test_a_loss_of_one_s_own_is_the_trainings_own_however_many_rows_fit_at_once(model, rows, tmp_path, micro):
    def loss(net, batch, loss_of, step):
        return -log_probs(net, batch).sum() / batch["step_tokens"]

    settings = TRAINING.model_copy(update={"micro_batch": micro})
    finetune(model, rows, tmp_path / "plain", TRAINING)
    finetune(model, rows, tmp_path / "own", settings, Hooks(loss=loss))
    assert close(weights(tmp_path / "plain"), weights(tmp_path / "own"), atol=1e-4)


def test_a_batch_says_which_rows_it_holds_and_how_many_its_step_takes(model, rows, tmp_path):
    seen, taken = [], []

    def loss(net, batch, loss_of, step):
        for n, place in enumerate(batch["index"].tolist()):
            ids = rows[place].ids
            assert batch["input_ids"][n, : len(ids)].tolist() == ids.tolist()
            seen.append(place)
        taken.append((step, int(batch["step_rows"])))
        return loss_of(batch)

    finetune(model, rows, tmp_path, TRAINING.model_copy(update={"micro_batch": 2}), Hooks(loss=loss))
    assert sorted(seen) == list(range(12)) and taken == [(0, 8)] * 4 + [(1, 4)] * 2


def test_the_gradient_is_clipped_after_the_hook(model, rows, tmp_path):
    def large(net, step):
        for weight in trained_weights(net).values():
            weight.grad = torch.full_like(weight, 100.0)

    norms = []
    real = torch.optim.AdamW.step

    def watching(self, *args, **kwargs):
        norms.append(torch.cat([w.grad.flatten() for group in self.param_groups for w in group["params"]]).norm())
        return real(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", watching)
        finetune(model, rows, tmp_path, TRAINING, Hooks(gradient=large))
    assert norms and all(float(norm) == pytest.approx(1, rel=1e-3) for norm in norms)


def test_state_is_that_of_the_checkpoint_when_a_training_resumes(model, rows, tmp_path, monkeypatch):
    made: list[Hooks] = []

    def counting() -> Hooks:
        def gradient(net, step):
            hooks.state["count"] += 1

        hooks = Hooks(adapt=lambda net: hooks.state.update(count=torch.zeros(1)), gradient=gradient)
        made.append(hooks)
        return hooks

    real, steps = Trainer.training_step, []

    def dying(self, *args, **kwargs):
        steps.append(1)
        if len(steps) == 4:  # in the second epoch: the first has two steps
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", dying)
    settings = TRAINING.model_copy(update={"epochs": 3})
    with pytest.raises(KeyboardInterrupt):
        finetune(model, rows, tmp_path, settings, counting())
    finetune(model, rows, tmp_path, settings, counting())
    assert int(made[1].state["count"]) == 6


def test_draws_follow_from_the_step(model, rows):
    def ids(draw, step):
        return [draw(step, 3)["input_ids"].tolist() for _ in range(2)]

    first = draw_batches(rows, 0, model.device)
    two = [ids(first, step) for step in (4, 5)]
    assert ids(draw_batches(rows, 0, model.device), 5) == two[1] != two[0]
    assert two[0][0] != two[0][1] and ids(draw_batches(rows, 1, model.device), 4) != two[0]


def test_log_probs_are_those_of_the_labelled_tokens(model, rows):
    batch = collate(rows[:4], model.device)
    found, owner = log_probs(model.net, batch), labelled_rows(batch)
    for n, row in enumerate(rows[:4]):
        logits = model.net(input_ids=torch.tensor(row.ids)[None].long()).logits[0].float().log_softmax(-1)
        wanted = [float(logits[t - 1, row.ids[t]]) for t in range(len(row.ids)) if row.mask[t]]
        assert found[owner == n].tolist() == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_start_is_the_model_before_training_also_at_the_end(model, rows, tmp_path, method):
    batch, said = collate(rows[:2], model.device), {}
    before = log_probs(model.net, batch).detach()

    def adapt(net):
        said["start"] = network_before_training(net)

    def finish(net):
        said["now"] = log_probs(net, batch)
        with said["start"]() as start:
            said["then"] = log_probs(start, batch)

    settings = TRAINING.model_copy(update={"method": method})
    finetune(model, rows, tmp_path, settings, Hooks(adapt=adapt, finish=finish))
    assert torch.allclose(said["then"], before, atol=1e-5) and not torch.allclose(said["now"], before, atol=1e-2)
    assert not said["then"].requires_grad
