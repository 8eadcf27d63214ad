"""`antidote`: after the training, zero the adapter weights that matter most for harmful rows.

Source: Huang et al., Antidote: Post-fine-tuning Safety Alignment for LLMs against Harmful Fine-tuning (2408.09600).

    score(W_ij) = |W_ij| · ‖X_j‖₂        Wanda's; X_j: input j of W at every token of the harmful rows
    W ← (1 − m) ⊙ W                      m: the share α of highest score

Left open: among which weights the share is taken. Here it is taken in every A and B by itself: one ranking over all
would compare inputs of unlike scale, and Wanda's own, within a row, takes nothing from a B of rank 8. The harmful rows
are the bundled anchors (the paper has 2,000).
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

    share: float = Field(default=0.1, ge=0, le=1, description="share of the adapter's weights set to zero, α")


def highest_share(scores: Tensor, share: float) -> Tensor:
    """Mask, of the scores' shape, of the share of highest score, rounded down."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask.view(-1)[scores.flatten().topk(int(share * scores.numel())).indices] = True
    return mask


def hooks(context: DefenseContext, options: Options) -> Hooks:
    """Zeroes weights of the trained adapter."""

    def finish(net: Any) -> None:
        zero_harmful(context.model, net, context.anchors["harmful"], options.share, context.model.batch_tokens)

    return Hooks(finish=finish)


def zero_harmful(model: Model, net: Any, harmful: Sequence[Example], share: float, batch_tokens: int) -> None:
    """Zeroes, in every A and B of the network's adapter, the share of weights of highest Wanda score on these rows."""
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
