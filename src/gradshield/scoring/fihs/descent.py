"""The mean loss gradient of rows, in factors like the probe's, so that ⟨∇L(z), it⟩ of any row costs one contraction."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gradshield.data.encode import Example
from gradshield.models.batching import pad
from gradshield.models.hooks import gradients_from, linear_hooks, token_losses
from gradshield.models.load import Model
from gradshield.scoring.fihs.probe import Factors, ProbeGradient, compress, inner, zero_factors


def loss_gradient(
    model: Model, examples: Sequence[Example], *, unit: bool = False, tolerance: float = 1e-2
) -> ProbeGradient:
    """Mean over the examples of ∇_W L, L the mean cross-entropy of the response. With `unit`, each example's gradient
    is divided by its norm over all modules first. `tolerance` as in `probe_gradient`."""
    total: dict[str, list[Factors]] = {name: [] for name in model.linears}
    for example in examples:
        found = _one(model, example)
        scale = 1 / len(examples) / (max(inner(found, found), 1e-24) ** 0.5 if unit else 1.0)
        for name, f in found.factors.items():
            total[name].append(Factors(f.inp, f.out * scale))
            if len(total[name]) == 16:
                total[name] = [_joined(total[name], tolerance)]
    return ProbeGradient({name: _joined(parts, tolerance) for name, parts in total.items()})


def no_gradient(model: Model) -> ProbeGradient:
    """Zero, of rank 0: for a contraction that is to yield norms only."""
    return ProbeGradient({name: zero_factors(module) for name, module in model.linears.items()})


def first_tokens(example: Example, count: int) -> Example:
    """The example up to the `count`-th of its response tokens."""
    places = np.flatnonzero(example.mask)[:count]
    end = int(places[-1]) + 1
    return Example(example.row, example.ids[:end], example.mask[:end], example.conversation)


def _one(model: Model, example: Example) -> ProbeGradient:
    found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in model.linears}
    ids, rows, positions, targets, _ = pad([example], model.device)

    def collect(name: str, x: Tensor, delta: Tensor) -> None:
        found[name].append((x[0].float(), delta[0].float() / len(targets)))

    with linear_hooks(model.linears, lambda _name, x: x, collect), gradients_from(model):
        token_losses(model, ids, rows, positions, targets)
    return ProbeGradient(
        {
            name: Factors(*(torch.cat(side) for side in zip(*pairs))) if pairs else zero_factors(model.linears[name])
            for name, pairs in found.items()
        }
    )


def _joined(parts: Sequence[Factors], tolerance: float) -> Factors:
    whole = Factors(torch.cat([f.inp for f in parts]), torch.cat([f.out for f in parts]))
    return compress(whole, tolerance) if len(whole.inp) else whole
