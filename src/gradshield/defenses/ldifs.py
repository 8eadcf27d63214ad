"""`ldifs`: keep the hidden states of the user's rows near those of the model before training.

Source: Mukhoti et al., Fine-tuning can cripple your foundation model (2308.13320). With h the features of a row,

    L = CE + ρ/2 mean over rows of ‖h(θ) − h(θ0)‖²

The paper is on image encoders, and takes features from all depths. Here h are the outputs of all decoder blocks, the
squared distance of a row is the mean over its tokens, and ρ is 1e-4, as where the method is used against harmful
fine-tuning (Antidote, 2408.09600).

Their code (git-disl/Booster, trainer.py, LDIFSTrainer) takes the outputs of the MLPs, sums the squared distance over
the rows and tokens of a batch, and leaves out a layer whose term is .1 or more. So one ρ says different things there
and here.
"""

from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor, nn

from gradshield.base.registry import NoOptions
from gradshield.defenses.base import Defense, DefenseContext
from gradshield.training.batches import remembered_start
from gradshield.training.interventions import Batch, Hooks


class Options(NoOptions):
    """Options of `ldifs`."""

    rho: float = Field(default=1e-4, ge=0, description="strength of the penalty, ρ")


def hooks(context: DefenseContext, options: Options) -> Hooks:
    """Cross-entropy with the penalty."""
    adapt, start = remembered_start()

    def loss(net: nn.Module, batch: Batch, loss_of: Callable[[Batch], Tensor], step: int) -> Tensor:
        with start() as reference, torch.no_grad():
            before = hidden(reference, batch)
        away = distances(hidden(net, batch), before, batch["attention_mask"])
        return loss_of(batch) + options.rho / 2 * away.sum() / batch["step_rows"]

    return Hooks(adapt=adapt, loss=loss)


def hidden(net: nn.Module, batch: Batch) -> list[Tensor]:
    """The outputs of the decoder blocks, each [rows, tokens, width]."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return list(net(**inputs, output_hidden_states=True, use_cache=False, logits_to_keep=1).hidden_states[1:])


def distances(now: list[Tensor], before: list[Tensor], mask: Tensor) -> Tensor:
    """‖h(θ) − h(θ0)‖² of each row [rows], the mean over its tokens."""
    total = torch.zeros(mask.shape, device=mask.device)
    for one, other in zip(now, before, strict=True):
        total = total + (one.float() - other.float()).square().sum(-1).to(mask.device)
    return (total * mask).sum(1) / mask.sum(1)


DEFENSE = Defense("ldifs", "keep hidden states near those before training (2308.13320)", Options, cost=2.3, hooks=hooks)
