"""FIHS of one example in its parts: a sum over probes, modules and tokens, all given by one backward pass."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradshield.data.encode import Example
from gradshield.hooks import gradients_from, linear_hooks, logits_at
from gradshield.model import Model
from gradshield.probe import ProbeGradient
from gradshield.scoring.contraction import pad

_PIECES = 6  # tokens at most that one character is made of
Shares = tuple[tuple[str, float], ...]
"""Names with their part of the sum of absolute parts, in [-1, 1]."""


def fihs_parts(model: Model, example: Example, gradients: Sequence[ProbeGradient]) -> tuple[Tensor, float]:
    """(⟨∇L, ∇S⟩ in its parts [probes, modules, tokens], ‖∇L‖² over all modules), both exact; float32 on the CPU."""
    names = list(gradients[0].factors)
    place = {name: n for n, name in enumerate(names)}
    ids, rows, positions, targets, weights = pad([example], model.device)
    parts = torch.zeros(len(gradients), len(names), len(example.ids))
    norm = 0.0

    def backward(name: str, x: Tensor, delta: Tensor) -> None:
        nonlocal norm
        x, delta = x[0].float(), delta[0].float()  # [T, d_in], [T, d_out]
        for probe, gradient in enumerate(gradients):
            f = gradient.factors[name]
            parts[probe, place[name]] += ((x @ f.inp.T) * (delta @ f.out.T)).sum(-1).cpu()
        norm += float(((x @ x.T) * (delta @ delta.T)).sum())  # ‖Σ_t δ_t x_tᵀ‖²

    modules = {name: model.linears[name] for name in names}
    with linear_hooks(modules, lambda _name, x: x, backward, in_place=True), gradients_from(model):
        logits = logits_at(model, ids, rows, positions).float()
        loss = torch.nn.functional.cross_entropy(logits, targets.to(logits.device), reduction="none")
        (loss * weights.to(loss.device)).sum().backward()
    return parts, norm


def shares(parts: Tensor) -> list[float]:
    """Each part over the sum of absolute parts."""
    return (parts / (float(parts.abs().sum()) or 1.0)).tolist()


def words(tokenizer: Any, example: Example, shares: Sequence[float], responses_only: bool = False) -> Shares:
    """Each token's text with its share; tokens that only together make a character are one."""
    ids = example.ids
    if responses_only:
        ids, shares = ids[example.mask], [share for share, inside in zip(shares, example.mask) if inside]
    found: list[tuple[str, float]] = []
    start = 0
    for end in range(1, len(shares) + 1):
        text = tokenizer.decode(ids[start:end].tolist(), clean_up_tokenization_spaces=False)
        if text.endswith("\ufffd") and end - start < _PIECES and end < len(shares):
            continue
        found.append((text, float(sum(shares[start:end]))))
        start = end
    return tuple(found)
