"""The hooks through which a defense can change the training function. By default, a hook does nothing."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

Batch = Mapping[str, Tensor]
"""`input_ids`, `attention_mask` and `labels` (-100 where nothing is trained), each [rows, tokens].

A batch of the training also has `index` [rows], the place of each row in the rows trained on, and two scalars: a step
may take several batches, and `step_rows` and `step_tokens` count the rows and the labelled tokens of all of them. So a
term that is a mean over rows is its sum over this batch, divided by `step_rows`; `loss_of` does the same with tokens.
"""


def nothing(*_: Any) -> None:
    """A hook that changes nothing."""


def own_loss(net: nn.Module, batch: Batch, loss_of: Callable[[Batch], Tensor], step: int) -> Tensor:
    """The training's own loss of the batch."""
    return loss_of(batch)


@dataclass(frozen=True)
class Hooks:
    """A defense in one training. A training can stop and resume: what a hook keeps must follow from the step or from
    `net`, or be in `state`.

    Where several processes train, each calls every hook, on its own rows.
    """

    adapt: Callable[[nn.Module], None] = nothing
    """(network with LoRA laid over it, or thawed) before the first step, and again where a training is resumed: then
    the weights of the checkpoint are loaded after it."""
    loss: Callable[[nn.Module, Batch, Callable[[Batch], Tensor], int], Tensor] = own_loss
    """(network, batch, the training's own loss of a batch, optimizer steps done) → the loss to minimise."""
    gradient: Callable[[nn.Module, int], None] = nothing
    """(network, optimizer steps done) after the backward passes of a step, before the gradient's norm is clipped: may
    change `.grad` in place."""
    finish: Callable[[nn.Module], None] = nothing
    """(trained network) before it is saved: may change the trained weights in place."""
    state: dict[str, Tensor] = field(default_factory=dict)
    """Tensors that are saved in every checkpoint. A resumed training copies them back in place after `adapt`, which
    must create them."""


NO_HOOKS = Hooks()
