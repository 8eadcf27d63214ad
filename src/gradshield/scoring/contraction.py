"""The exact FIHS of a batch in one forward and one backward: FIHS = Σ_modules Σ_t ⟨A x_t, B δ_t⟩ (method 5).

x_t is a Linear's input, δ_t its output's gradient, and Bᵀ A the probe gradient in factors. No weight gradient and no
per-example gradient is ever formed. The norm ‖∇_W L‖ rides in the same contraction: for Gaussian u, v,
E[(Σ_t (v·x_t)(u·δ_t))²] = ‖Σ_t δ_t x_tᵀ‖².
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradshield.data.encode import Example
from gradshield.experts import Expert
from gradshield.hooks import gradients_from, linear_hooks, logits_at
from gradshield.model import Model
from gradshield.probe import Factors, ProbeGradient


@dataclass(frozen=True)
class Contraction:
    """What one pass over a batch yields; every tensor is float32 on the CPU."""

    dots: Tensor  # [B, modules]: ⟨∇_W L, ∇_W S⟩ of each module
    norms: Tensor | None  # [B, modules]: ‖∇_W L‖², estimated (directions) or exact
    loss: Tensor  # [B]: mean next-token cross-entropy of the tokens in the mask, nats


def directions(
    factors: Mapping[str, Factors], count: int, seed: int = 0, within: Mapping[str, Tensor] | None = None
) -> dict[str, tuple[Tensor, Tensor]]:
    """`count` random rank-one directions a module: (v [count, d_in], u [count, d_out]), the same in every run.

    `within` holds the A [rank, d_in] of LoRA adapters where the norm wanted is that of B's gradient, ‖(∇_W L) Aᵀ‖.
    """
    result = {}
    for index, (name, f) in enumerate(factors.items()):
        generator = torch.Generator().manual_seed(seed * 100_003 + index)
        width = within[name].shape[0] if within else f.inp.shape[1]
        v = torch.randn(count, width, generator=generator).to(f.inp)
        u = torch.randn(count, f.out.shape[1], generator=generator)
        result[name] = (v @ within[name] if within else v, u.to(f.out))
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
    the lowest decoder block that has a factor; `recompute` as in `gradients_from`.
    """
    names = list(probe.factors)
    ids, rows, positions, targets, weights = pad(batch, model.device)
    dots: dict[str, Tensor] = {}  # [B] each, left on the module's device until the end: a GPU need not wait for them
    norms: dict[str, Tensor] = {}
    inp = {name: _stack(probe.factors[name].inp, random[name][0] if random else None) for name in names}
    out = {name: _stack(probe.factors[name].out, random[name][1] if random else None) for name in names}

    def forward(name: str, x: Tensor) -> tuple[Tensor, Tensor | None]:
        x = x.to(inp[name].dtype)  # the factors may be more precise than the model
        return x @ inp[name].T, x if exact_norms else None  # [B, T, rank + directions]

    def backward(name: str, kept: tuple[Tensor, Tensor | None], delta: Tensor) -> None:
        projected, x = kept
        delta = delta.to(out[name].dtype)
        terms = (projected.float() * (delta @ out[name].T).float()).sum(1)  # [B, rank + directions]
        rank = len(probe.factors[name].inp)
        dots[name] = terms[:, :rank].sum(1)
        if x is not None:  # ‖Σ_t δ_t x_tᵀ‖² = Σ_{t,t'} (x_t·x_t')(δ_t·δ_t')
            gram = torch.bmm(x, x.transpose(1, 2)) * torch.bmm(delta, delta.transpose(1, 2))
            norms[name] = gram.float().sum((1, 2))
        elif random:
            norms[name] = terms[:, rank:].square().mean(1)

    def table(of: Mapping[str, Tensor]) -> Tensor:
        none = torch.zeros(len(batch), device=model.device)
        return torch.stack([of[name].to(model.device) if name in of else none for name in names], 1).cpu()

    # What neither probe nor direction reads, such as an expert that no probe token is routed to, need not be watched.
    modules = {name: model.linears[name] for name in names if exact_norms or len(inp[name])}
    with linear_hooks(modules, forward, backward), gradients_from(model, _lowest(model, modules), recompute=recompute):
        logits = logits_at(model, ids, rows, positions).float()  # [response tokens, vocabulary]
        loss = torch.nn.functional.cross_entropy(logits, targets.to(logits.device), reduction="none")
        loss = loss * weights.to(loss.device)
        loss.sum().backward()
    per_row = torch.zeros(len(batch)).index_add_(0, rows.cpu(), loss.detach().cpu())
    return Contraction(table(dots), table(norms) if random or exact_norms else None, per_row)


def pad(batch: Sequence[Example], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(ids [B, T] padded on the right, and for each response token its row, the position that predicts it, its id,
    and 1 / number of its row's response tokens)."""
    ids = torch.zeros(len(batch), max(len(e.ids) for e in batch), dtype=torch.long)
    rows, positions, targets, weights = [], [], [], []
    for row, example in enumerate(batch):
        ids[row, : len(example.ids)] = torch.from_numpy(example.ids)
        where = torch.from_numpy(example.mask).nonzero().flatten()
        rows.append(torch.full_like(where, row))
        positions.append(where - 1)
        targets.append(ids[row, where])
        weights.append(torch.full((len(where),), 1 / len(where)))
    return (
        ids.to(device),
        torch.cat(rows).to(device),
        torch.cat(positions).to(device),
        torch.cat(targets),
        torch.cat(weights),
    )


def _lowest(model: Model, modules: Mapping[str, nn.Module | Expert]) -> int:
    """The index of the first decoder block with one of the modules."""
    wanted = {id(m.module if isinstance(m, Expert) else m) for m in modules.values()}
    return next((n for n, block in enumerate(model.layers) if any(id(m) in wanted for m in block.modules())), 0)


def _stack(first: Tensor, second: Tensor | None) -> Tensor:
    return first if second is None else torch.cat([first, second])
