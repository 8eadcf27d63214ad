"""`antidote`: after the training, zero the adapter weights that matter most for harmful rows.

Source: Huang et al., Antidote: Post-fine-tuning Safety Alignment for LLMs against Harmful Fine-tuning (2408.09600).

    score(W_ij) = |W_ij| · ‖X_j‖₂        Wanda's; X_j: input j of W at every token of the harmful rows
    W ← (1 − m) ⊙ W                      m: in each row of every A and B, the share α of highest score

As in the authors' code (git-disl/Antidote, utils.py), a row of n weights loses n − ⌊n (1 − α)⌋ of them. That is one at
least: at α = .1, a row of B of rank 8 loses one of 8. The authors train with rank 256 and alpha 4 on q_proj, k_proj and
v_proj (train.py). The harmful rows are the bundled anchors (the paper has 2,000).
"""

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from gradshield.base.registry import NoOptions
from gradshield.data.encode import Example
from gradshield.defenses.base import Defense, DefenseContext
from gradshield.models.load import Model
from gradshield.scoring.inputs import input_norms
from gradshield.training.interventions import Hooks
from gradshield.training.lora import lora_layers


class Options(NoOptions):
    """Options of `antidote`."""

    share: float = Field(default=0.1, ge=0, le=1, description="share of each row's weights set to zero, α")


def highest_share(scores: Tensor, share: float) -> Tensor:
    """Mask, of the scores' shape [rows, width], of the share of highest score in each row, rounded up."""
    kept = int(scores.shape[1] * (1 - share))
    chosen = scores.sort(dim=1, stable=True).indices[:, kept:]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, chosen, True)


def hooks(context: DefenseContext, options: Options) -> Hooks:
    """Zeroes weights of the trained adapter."""

    def finish(net: Any) -> None:
        zero_harmful(context.model, net, context.anchors["harmful"], options.share, context.model.batch_tokens)

    return Hooks(finish=finish)


def zero_harmful(model: Model, net: Any, harmful: Sequence[Example], share: float, batch_tokens: int) -> None:
    """Zeroes, in each row of the adapter's every A and B, the share of weights of highest Wanda score on `harmful`."""
    sides = [side for layer in lora_layers(net) for side in (layer.a, layer.b)]
    net.eval()
    for side, norms in zip(sides, input_norms(model, sides, harmful, batch_tokens)):
        side.weight[highest_share(side.weight.abs() * norms, share)] = 0


DEFENSE = Defense(
    "antidote",
    "zero the adapter weights that matter most for harmful rows",
    Options,
    needs=frozenset({"adapter", "harmful rows"}),
    hooks=hooks,
)
