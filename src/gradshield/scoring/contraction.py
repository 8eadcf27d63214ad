"""The exact FIHS of a batch in one forward and one backward: FIHS = Σ_modules Σ_t ⟨A x_t, B δ_t⟩ (method 5).

x_t is a Linear's input, δ_t its output's gradient, and Bᵀ A the probe gradient in factors. No weight gradient and no
per-example gradient is ever formed. The norm ‖∇_W L‖ rides in the same contraction: for Gaussian u, v,
E[(Σ_t (v·x_t)(u·δ_t))²] = ‖Σ_t δ_t x_tᵀ‖².
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradshield.data.encode import Example
from gradshield.hooks import gradients_from, linear_hooks, logits_at
from gradshield.model import Model
from gradshield.probe import Factors, ProbeGradient


@dataclass(frozen=True)
class Contraction:
    """What one pass over a batch yields; every tensor is float32 on the CPU."""

    dots: Tensor  # [B, modules]: ⟨∇_W L, ∇_W S⟩ of each module
    norms: Tensor | None  # [B, modules]: ‖∇_W L‖², estimated (directions) or exact
    loss: Tensor  # [B]: mean next-token cross-entropy of the tokens in the mask, nats


def directions(factors: Mapping[str, Factors], count: int, seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    """`count` random rank-one directions a module: (v [count, d_in], u [count, d_out]), the same for every model and run."""
    result = {}
    for index, (name, f) in enumerate(factors.items()):
        generator = torch.Generator().manual_seed(seed * 100_003 + index)
        v = torch.randn(count, f.inp.shape[1], generator=generator)
        u = torch.randn(count, f.out.shape[1], generator=generator)
        result[name] = (v.to(f.inp), u.to(f.out))
    return result
