"""What every registered defense must do. A defense is tested by being registered."""

import numpy as np
import pytest
import torch
from conftest import random_examples

from gradshield.base.settings import FilterSettings, FinetuneSettings
from gradshield.defenses.base import DefenseContext
from gradshield.defenses.registry import DEFENSES, find_defense
from gradshield.defenses.train import train_defended
from gradshield.models.load import load_model
from gradshield.threshold import Threshold
from gradshield.training.batches import collate, log_probs

TRAINING = FinetuneSettings(epochs=1, learning_rate=1e-3)


def with_options(name: str, base: str) -> str:
    """The defense with every option written out, so that each is parsed; few safe rows, so that a training is short."""
    values = {k: v for k, v in find_defense(name)[1].model_dump().items() if v is not None}
    values |= {"count": 4} if "count" in values else {}
    values |= {"base": base} if "base model" in find_defense(name)[0].needs else {}
    return f"{name}:{','.join(f'{k}={v}' for k, v in values.items())}"


@pytest.mark.parametrize("name", DEFENSES.names())
def test_every_row_is_trained_on_as_it_is_or_left_out_and_what_is_trained_loads(
    name, tiny_folder, tiny_base_folder, tmp_path
):
    model, settings = load_model(tiny_folder), FilterSettings()
    given = random_examples(12, len(model.tokenizer))
    spec = with_options(name, tiny_base_folder)
    defense, options = find_defense(spec)
    screen = (np.arange(12.0), Threshold(8.0, "fixed", "")) if "screening" in defense.needs else None
    found = defense.rows(DefenseContext(model, settings, TRAINING, screen), options, given)
    own = {e.row: e for e in found if e.row >= 0}
    assert own and all(e is given[row] for row, e in own.items()) and len(own) == sum(e.row >= 0 for e in found)
    assert all(e.row == -1 and e.mask.any() for e in found if e.row < 0)
    assert len(found) == len(own) or "safe rows" in defense.needs or "harmful rows" in defense.needs

    before = {n: w.clone() for n, w in model.net.state_dict().items()}
    figures = train_defended(model, found, tmp_path, TRAINING, settings, spec)
    assert figures["steps"] >= 1 and np.isfinite(figures["loss"])
    assert all(torch.equal(before[n], w) for n, w in model.net.state_dict().items())
    trained = load_model(tiny_folder, adapter=str(tmp_path))
    batch = collate(given[:4], model.device)
    said = [log_probs(net, batch) for net in (model.net, trained.net)]
    assert torch.isfinite(said[1]).all() and not torch.equal(*said)
