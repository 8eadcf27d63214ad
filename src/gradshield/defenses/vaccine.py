"""`vaccine`: align under the worst small perturbation of the hidden states.

Source: Huang, Hu and Liu, Vaccine: Perturbation-aware Alignment for LLMs (2402.01109), and the authors' code. With e_l
the output of attention layer l:

    ε_l = ρ ∇_{e_l} L / ‖(∇_{e_1} L, …, ∇_{e_K} L)‖      from a first pass, all layers in one norm
    w ← AdamW of L(w; e_1 + ε_1, …, e_K + ε_K)           by a second pass

Left open: ρ for a small model (the paper's 2 for a 7B one; option `rho`). The rows are our alignment's.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from pydantic import Field
from torch import Tensor, nn

from gradshield.base.registry import NoOptions
from gradshield.defenses.base import Defense, DefenseContext
from gradshield.training.interventions import Batch, Hooks


class Options(NoOptions):
    """Options of `vaccine`."""

    rho: float = Field(default=2.0, ge=0, description="norm of the perturbation, ρ")


@contextmanager
def outputs_of(modules: Sequence[nn.Module], change: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """Within it, each module's output, or the first of its outputs, becomes `change(its number, output)`."""

    def hook(number: int):
        def replaced(_module: nn.Module, _args: object, output: Tensor | tuple) -> Tensor | tuple:
            if isinstance(output, tuple):
                return (change(number, output[0]), *output[1:])
            return change(number, output)

        return replaced

    handles = [module.register_forward_hook(hook(n)) for n, module in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def perturbations(modules: Sequence[nn.Module], loss: Callable[[], Tensor], rho: float) -> list[Tensor]:
    """ε of each module's output: along the gradient of the loss, of norm ρ over all of them together."""
    states: dict[int, Tensor] = {}

    def keep(number: int, state: Tensor) -> Tensor:
        states[number] = state
        return state

    with outputs_of(modules, keep):
        value = loss()
    gradients = torch.autograd.grad(value, [states[n] for n in range(len(modules))])
    norm = torch.stack([g.float().norm().cpu() for g in gradients]).norm()
    return [g * (rho / (float(norm) + 1e-7)) for g in gradients]


def perturbed_loss(modules: Sequence[nn.Module], loss: Callable[[], Tensor], rho: float) -> Tensor:
    """The loss at the perturbed states."""
    epsilon = perturbations(modules, loss, rho)
    with outputs_of(modules, lambda number, state: state + epsilon[number]):
        return loss()


def align_hooks(context: DefenseContext, options: Options) -> Hooks:
    """Two passes a step."""
    attention = [block.get_submodule("self_attn") for block in context.model.layers]

    def loss(net: nn.Module, batch: Batch, loss_of: Callable[[Batch], Tensor], step: int) -> Tensor:
        return perturbed_loss(attention, lambda: loss_of(batch), options.rho)

    return Hooks(loss=loss)


DEFENSE = Defense(
    "vaccine",
    "align under the worst small perturbation of hidden states",
    Options,
    needs=frozenset({"alignment recipe"}),
    cost=3.0,
    align_hooks=align_hooks,
)
