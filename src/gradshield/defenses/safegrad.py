"""`safegrad`: take out of the user's gradient what goes against the gradient of safety.

Source: Yi et al., Gradient Surgery for Safe LLM Fine-Tuning (2508.07172), eqs. 3 to 6. At every step, over all trained
weights at once:

    g_safe = ∇ KL(π_ref(·|x) ‖ π(·|x)) on a batch of safe rows,   π_ref: the model before training
    g ← g_user − (g_user·g_safe / ‖g_safe‖²) g_safe   where g_user·g_safe < 0,   else g_user
    gradient = g + ρ g_safe,   ρ = 1, 100 safe rows

The KL divergence is the mean over the answers' tokens, so that it does not depend on a batch's padding. At the first
step π = π_ref and g_safe is zero: then g = g_user. No code of the authors was found to compare with.
"""

from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor, nn

from gradshield.base.processes import processes
from gradshield.defenses.base import Defense, DefenseContext
from gradshield.defenses.registry import SafeRows
from gradshield.training.batches import draw_batches, logits_of, remembered_start, trained_weights
from gradshield.training.interventions import Batch, Hooks

SMALLEST = 1e-9  # ‖g_safe‖² from which there is a direction to project on


class Options(SafeRows):
    """The safe rows and the weight of their gradient."""

    rho: float = Field(default=1.0, ge=0, description="weight of the safe rows' gradient, ρ")


def hooks(context: DefenseContext, options: Options) -> Hooks:
    """The safe gradient of every batch, and the surgery at the end of its step."""
    draw = draw_batches(context.safe_rows(options), context.training.seed, context.model.device)
    remember, start = remembered_start()
    own: list[nn.Module] = []
    safe: dict[str, Tensor] = {}  # of the step so far

    def adapt(net: nn.Module) -> None:
        remember(net)
        own[:] = [net]
        safe.clear()

    def loss(net: nn.Module, batch: Batch, loss_of: Callable[[Batch], Tensor], step: int) -> Tensor:
        rows, weights = len(batch["index"]), trained_weights(own[0])
        given = draw(step, rows)
        with start() as reference, torch.no_grad():
            before = logits_of(reference, given)[0].log_softmax(-1)
        now = logits_of(own[0], given)[0].log_softmax(-1)
        away = nn.functional.kl_div(now, before, reduction="batchmean", log_target=True)
        part = torch.autograd.grad(away * rows / batch["step_rows"], list(weights.values()), allow_unused=True)
        for name, found in zip(weights, part):
            if found is not None:
                safe[name] = safe[name] + found if name in safe else found
        return loss_of(batch)

    def gradient(net: nn.Module, step: int) -> None:
        weights = trained_weights(net)
        user = {name: torch.zeros_like(w) if w.grad is None else w.grad for name, w in weights.items()}
        for name, found in without_conflict(user, averaged(safe), options.rho).items():
            weights[name].grad = found
        safe.clear()

    return Hooks(adapt=adapt, loss=loss, gradient=gradient)


def without_conflict(user: dict[str, Tensor], safe: dict[str, Tensor], rho: float) -> dict[str, Tensor]:
    """The gradient to step along. Weights that the safe rows say nothing of keep the user's."""
    dot = sum(float((user[name] * g).sum()) for name, g in safe.items())
    square = sum(float(g.square().sum()) for g in safe.values())
    against = dot / square if dot < 0 and square > SMALLEST else 0.0
    return user | {name: user[name] + (rho - against) * g for name, g in safe.items()}


def averaged(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their mean over the processes."""
    if processes() > 1:
        for found in gradients.values():
            torch.distributed.all_reduce(found)
            found /= processes()
    return gradients


DEFENSE = Defense(
    "safegrad",
    "remove the part of the gradient that opposes safety (2508.07172)",
    Options,
    needs=frozenset({"safe rows"}),
    cost=2.3,
    hooks=hooks,
)
