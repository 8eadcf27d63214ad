"""`bds`: a weight for every row, learned beside the model, which is trained on safe rows at the same time.

Source: Hu et al., Bayesian Data Scheduler (2510.27172), with its scalar scheduler, and the authors' code. With p one
number per row of the N, w = N softmax(p) and ℓ_i the mean cross-entropy of row i, every step does

    θ ← AdamW of mean ℓ(safe batch) + mean over the batch of w_i ℓ_i
    p ← Adam of mean over the batch of w_i ℓ_i,   θ held

so a row that goes against the safe ones keeps a high loss, and its weight falls:

    ∂/∂p_j = (1/|B|) Σ_B w_i ℓ_i (δ_ij − softmax(p)_j)

p starts even, its learning rate is 5e-3, and there is no prior on p, as in the authors' script. Its trainings have
2,000 steps. A shorter one moves p less: raise `rate` in proportion. The script (Egg-Hu/Bayesian-Data-Scheduler,
run/scripts/0_train_eval_dbs.sh) trains a LoRA of rank 32 and alpha 4 on q_proj, k_proj and v_proj in batches of ten, at
a constant learning rate of 1e-5 with weight decay .1.
"""

from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor, nn

from gradshield.base.errors import UserError
from gradshield.base.processes import processes
from gradshield.defenses.base import Defense, DefenseContext
from gradshield.defenses.registry import SafeRows
from gradshield.training.batches import draw_batches, labelled_rows, log_probs
from gradshield.training.interventions import Batch, Hooks

BETAS = (0.9, 0.95)


class Options(SafeRows):
    """The scheduler."""

    rate: float = Field(default=5e-3, gt=0, description="learning rate of the weights' logits, p")


def check(context: DefenseContext, options: Options) -> None:
    """Raises UserError under a launcher: a row's weight would have to be known in all processes."""
    if processes() > 1:
        raise UserError("--defense bds works in one process only: start it without a launcher")


def hooks(context: DefenseContext, options: Options) -> Hooks:
    """The weighted loss, and a step of p at the end of each step."""
    draw = draw_batches(context.safe_rows(options), context.training.seed, context.model.device)
    count, device = len(context.examples), context.model.device
    state: dict[str, Tensor] = {}
    slopes: list[Tensor] = []  # of the step so far

    def adapt(net: nn.Module) -> None:
        state.update({name: torch.zeros(count, device=device) for name in ("p", "mean", "square")})
        slopes.clear()

    def loss(net: nn.Module, batch: Batch, loss_of: Callable[[Batch], Tensor], step: int) -> Tensor:
        rows, index, size = len(batch["index"]), batch["index"].to(device), batch["step_rows"]
        losses, safe = (row_losses(net, part).to(device) for part in (batch, draw(step, rows)))
        weights = count * state["p"].softmax(0)[index]
        slopes.append(slope(state["p"], index, losses.detach()) / size)
        return (safe.sum() + (weights * losses).sum()) / size

    def gradient(net: nn.Module, step: int) -> None:
        adam(state, torch.stack(slopes).sum(0), step, options.rate)
        slopes.clear()

    return Hooks(adapt=adapt, loss=loss, gradient=gradient, state=state)


def row_losses(net: nn.Module, batch: Batch) -> Tensor:
    """The mean cross-entropy of each row's answer [rows]."""
    found, rows = -log_probs(net, batch), len(batch["input_ids"])
    owner = labelled_rows(batch).to(found.device)
    return found.new_zeros(rows).index_add(0, owner, found) / torch.bincount(owner, minlength=rows)


def slope(p: Tensor, index: Tensor, losses: Tensor) -> Tensor:
    """∂/∂p of Σ w_i ℓ_i over the rows at `index`."""
    share = p.softmax(0)
    weighted = len(p) * share[index] * losses
    return torch.zeros_like(p).index_add(0, index, weighted) - weighted.sum() * share


def adam(state: dict[str, Tensor], found: Tensor, step: int, rate: float) -> None:
    """A step of Adam on state["p"], in place; `step` of them are done."""
    state["mean"].lerp_(found, 1 - BETAS[0])
    state["square"].lerp_(found.square(), 1 - BETAS[1])
    mean, square = (state[n] / (1 - b ** (step + 1)) for n, b in zip(("mean", "square"), BETAS))
    state["p"] -= rate * mean / (square.sqrt() + 1e-8)


DEFENSE = Defense(
    "bds",
    "learn a weight per row, with the help of safe rows (2510.27172)",
    Options,
    needs=frozenset({"safe rows"}),
    cost=2.0,
    hooks=hooks,
    check=check,
)
