"""The exact FIHS of a batch in one forward and one backward: FIHS = Σ_modules Σ_t ⟨A x_t, B δ_t⟩ (method 5).

x_t is a Linear's input, δ_t its output's gradient, and Bᵀ A the probe gradient in factors. No weight gradient and no
per-example gradient is ever formed. The norm ‖∇_W L‖ rides in the same contraction: for Gaussian u, v,
E[(Σ_t (v·x_t)(u·δ_t))²] = ‖Σ_t δ_t x_tᵀ‖².
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradshield.base.errors import UserError
from gradshield.data.encode import Example
from gradshield.models.batching import pad
from gradshield.models.experts import Expert
from gradshield.models.hooks import gradients_from, linear_hooks, token_losses
from gradshield.models.load import Model
from gradshield.scoring.fihs.probe import Factors, ProbeGradient


@dataclass(frozen=True)
class Contraction:
    """What one pass over a batch yields; every tensor is float32 on the CPU."""

    dots: Tensor  # [B, modules]: ⟨∇_W L, ∇_W S⟩ of each module
    norms: Tensor | None  # [B, modules]: ‖∇_W L‖², estimated (directions) or exact
    loss: Tensor  # [B]: mean next-token cross-entropy of the tokens in the mask, nats


def random_directions(
    factors: Mapping[str, Factors], count: int, within: Mapping[str, Tensor] | None = None
) -> dict[str, tuple[Tensor, Tensor]]:
    """`count` random rank-one directions a module: (v [count, d_in], u [count, d_out]), the same in every run.

    `within` holds the A [rank, d_in] of LoRA adapters where the norm wanted is that of B's gradient, ‖(∇_W L) Aᵀ‖.
    """
    result = {}
    for index, (name, f) in enumerate(factors.items()):
        generator = torch.Generator().manual_seed(index)
        width = within[name].shape[0] if within else f.inp.shape[1]
        v = torch.randn(count, width, generator=generator)
        u = torch.randn(count, f.out.shape[1], generator=generator)
        if within:
            v = v.to(within[name]) @ within[name]
        result[name] = (v.to(f.inp), u.to(f.out))
    return result


def contract(
    model: Model,
    batch: Sequence[Example],
    probe: ProbeGradient,
    random: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    *,
    exact_norms: bool = False,
    recompute: bool = False,
) -> Contraction:
    """FIHS of every example and module (eq. 4), with gradient norms by `random` directions, exactly, or not at all.

    The loss of an example is the mean over its masked tokens; examples may differ in length. The backward pass ends at
    the lowest decoder block that has a factor; `recompute` as in `gradients_from`. A module that runs several times
    in a pass has the sum of its gradients; only exact norms can't tell, and raise UserError.
    """
    names = list(probe.factors)
    ids, rows, positions, targets, weights = pad(batch, model.device)
    terms: dict[str, Tensor] = {}  # [B, rank + directions], left on the module's device: a GPU need not wait for them
    exact: dict[str, Tensor] = {}
    inp = {name: _stack(probe.factors[name].inp, random[name][0] if random else None) for name in names}
    out = {name: _stack(probe.factors[name].out, random[name][1] if random else None) for name in names}

    def forward(name: str, x: Tensor) -> tuple[Tensor, Tensor | None]:
        x = x.to(inp[name].dtype)  # the factors may be more precise than the model
        return x @ inp[name].T, x if exact_norms else None  # [B, T, rank + directions]

    def backward(name: str, kept: tuple[Tensor, Tensor | None], delta: Tensor) -> None:
        projected, x = kept
        delta = delta.to(out[name].dtype)
        found = (projected.float() * (delta @ out[name].T).float()).sum(1)
        terms[name] = terms[name] + found if name in terms else found
        if x is not None:  # ‖Σ_t δ_t x_tᵀ‖² = Σ_{t,t'} (x_t·x_t')(δ_t·δ_t')
            if name in exact:
                raise UserError(f"{name} runs several times per pass, so its norms can't be computed exactly")
            gram = torch.bmm(x, x.transpose(1, 2)) * torch.bmm(delta, delta.transpose(1, 2))
            exact[name] = gram.float().sum((1, 2))

    def table(of: Callable[[str, Tensor], Tensor]) -> Tensor:
        none = torch.zeros(len(batch), device=model.device)
        columns = [of(name, terms[name]).to(model.device) if name in terms else none for name in names]
        return torch.stack(columns, 1).cpu()

    def dot(name: str, found: Tensor) -> Tensor:
        return found[:, : len(probe.factors[name].inp)].sum(1)

    def norm(name: str, found: Tensor) -> Tensor:
        return exact[name] if exact else found[:, len(probe.factors[name].inp) :].square().mean(1)

    # What neither probe nor direction reads, such as an expert that no probe token is routed to, need not be watched.
    modules = {name: model.linears[name] for name in names if exact_norms or len(inp[name])}
    with linear_hooks(modules, forward, backward), gradients_from(model, _lowest(model, modules), recompute=recompute):
        # The backward is of the sum over a row's tokens: the mean's δ would be too small for float16.
        loss = token_losses(model, ids, rows, positions, targets).cpu() * weights
    per_row = torch.zeros(len(batch)).index_add_(0, rows.cpu(), loss)
    share = 1 / torch.bincount(rows.cpu(), minlength=len(batch)).clamp_min(1)[:, None]  # from the sum to the mean
    return Contraction(table(dot) * share, table(norm) * share.square() if random or exact_norms else None, per_row)


def _lowest(model: Model, modules: Mapping[str, nn.Module | Expert]) -> int:
    """The index of the first decoder block with one of the modules."""
    wanted = {id(m.module if isinstance(m, Expert) else m) for m in modules.values()}
    return next((n for n, block in enumerate(model.layers) if any(id(m) in wanted for m in block.modules())), 0)


def _stack(first: Tensor, second: Tensor | None) -> Tensor:
    return first if second is None else torch.cat([first, second])
