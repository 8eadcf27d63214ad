"""`booster`: align so that a step on harmful rows lowers their loss little.

Source: Huang et al., Booster: Tackling Harmful Fine-tuning for LLMs via Attenuating Harmful Perturbation (2409.01586),
and the authors' code. With f the loss of the alignment's rows and h that of harmful ones:

    min f(w) + λ (h(w) − h(w − α ∇h(w)/‖∇h(w)‖))
    step's gradient: ∇f(w) + λ (∇h(w) − ∇h(w − α ∇h(w)/‖∇h(w)‖))       the inner step counts as a constant

λ and α are the paper's. w are the weights of the alignment's adapter. The harmful rows are the bundled anchors, drawn
again for every step: openings of answers, where the paper has whole ones.
"""

from collections.abc import Callable, Mapping

import torch
from pydantic import Field
from torch import Tensor, nn

from gradshield.base.registry import NoOptions
from gradshield.defenses.base import Defense, DefenseContext
from gradshield.training.batches import draw_batches, log_probs, trained_weights
from gradshield.training.interventions import Hooks


class Options(NoOptions):
    """Options of `booster`."""

    strength: float = Field(default=5.0, ge=0, description="weight of the harmful term, λ")
    step: float = Field(default=0.1, gt=0, description="length of the harmful step, α")
    harmful: int = Field(default=10, ge=1, description="harmful rows in a step")


def add_attenuation(
    weights: Mapping[str, nn.Parameter], harmful: Callable[[], Tensor], strength: float, step: float
) -> None:
    """Adds λ (∇h(w) − ∇h(w − α ∇h/‖∇h‖)) to the gradients of the weights, which stay as they are."""
    names = list(weights)

    def gradient() -> dict[str, Tensor]:
        with torch.enable_grad():
            found = torch.autograd.grad(harmful(), [weights[n] for n in names], allow_unused=True)
        return {n: torch.zeros_like(weights[n]) if g is None else g for n, g in zip(names, found)}

    here = gradient()
    norm = float(torch.stack([g.norm().cpu() for g in here.values()]).norm()) + 1e-7
    with torch.no_grad():
        before = {n: weight.clone() for n, weight in weights.items()}
        for n, weight in weights.items():
            weight -= step * here[n] / norm
        there = gradient()
        for n, weight in weights.items():
            weight.copy_(before[n])
            added = strength * (here[n] - there[n])
            weight.grad = added if weight.grad is None else weight.grad + added


def align_hooks(context: DefenseContext, options: Options) -> Hooks:
    """Adds the harmful term to every step."""
    draw = draw_batches(context.anchors["harmful"], context.training.seed, context.model.device)

    def gradient(net: nn.Module, step: int) -> None:
        batch = draw(step, options.harmful)
        add_attenuation(trained_weights(net), lambda: -log_probs(net, batch).mean(), options.strength, options.step)

    return Hooks(gradient=gradient)


DEFENSE = Defense(
    "booster",
    "align so that training steps on harmful rows change little",
    Options,
    needs=frozenset({"alignment recipe", "harmful rows"}),
    cost=4.0,
    align_hooks=align_hooks,
)
