"""`lisa`: alternate between steps on safe rows and on the user's; each phase stays near the weights the other left.

Source: Huang et al., Lisa: Lazy Safety Alignment (2405.18641), and the authors' code. With w_switch the weights at the
last change of phase:

    safe phase, `safe_steps` steps    w ← AdamW of L(w, safe batch) + ρ/2 ‖w − w_switch‖²
    user phase, `user_steps` steps    w ← AdamW of L(w, user batch) + ρ/2 ‖w − w_switch‖²

ρ = 1, the safe phase comes first, w are the trained weights (LoRA's factors), and the proximal term starts after a
tenth of the training, as in the authors' code. A safe step takes the place of a user step: its user rows are not
trained on in that epoch. The paper has 100 and 900 steps in trainings of 20,000. Trainings here have some hundred, so
the defaults are 2 and 18: the same share of safe steps, and as many phases.
"""

from collections.abc import Callable
from math import ceil

import torch
from pydantic import Field
from torch import Tensor, nn

from gradshield.defenses.base import Defense, DefenseContext
from gradshield.defenses.registry import SafeRows
from gradshield.training.batches import draw_batches, log_probs, trained_weights
from gradshield.training.interventions import Batch, Hooks


class Options(SafeRows):
    """The phases and the proximal term."""

    safe_steps: int = Field(default=2, ge=1, description="optimizer steps of a phase on safe rows")
    user_steps: int = Field(default=18, ge=1, description="optimizer steps of a phase on the user's rows")
    rho: float = Field(default=1.0, ge=0, description="strength of the proximal term, ρ")
    warmup: float = Field(default=0.1, ge=0, le=1, description="share of the training without the proximal term")


def hooks(context: DefenseContext, options: Options) -> Hooks:
    """The two phases of the training."""
    draw = draw_batches(context.safe_rows(options), context.training.seed, context.model.device)
    steps = ceil(ceil(len(context.examples) / context.training.batch) * context.training.epochs)
    switched: dict[str, Tensor] = {}

    def adapt(net: nn.Module) -> None:
        switched.update({name: weight.detach().clone() for name, weight in trained_weights(net).items()})

    def loss(net: nn.Module, batch: Batch, loss_of: Callable[[Batch], Tensor], step: int) -> Tensor:
        if step % (options.safe_steps + options.user_steps) >= options.safe_steps:
            return loss_of(batch)
        rows = len(batch["index"])
        return -log_probs(net, draw(step, rows)).mean() * rows / batch["step_rows"]

    def gradient(net: nn.Module, step: int) -> None:
        weights = trained_weights(net)
        if step % (options.safe_steps + options.user_steps) in (0, options.safe_steps):
            for name, weight in weights.items():
                switched[name].copy_(weight.detach())
        if step > options.warmup * steps:
            pull(weights, switched, options.rho)

    return Hooks(adapt=adapt, loss=loss, gradient=gradient, state=switched)


@torch.no_grad()
def pull(weights: dict[str, nn.Parameter], switched: dict[str, Tensor], rho: float) -> None:
    """Adds the gradient of ρ/2 ‖w − w_switch‖²."""
    for name, weight in weights.items():
        away = rho * (weight - switched[name])
        weight.grad = away if weight.grad is None else weight.grad + away


DEFENSE = Defense(
    "lisa",
    "alternate safe and user steps with a proximal term (2405.18641)",
    Options,
    needs=frozenset({"safe rows"}),
    hooks=hooks,
)
