"""FIHS of one example in its parts: a sum over probes, modules and tokens, all given by one backward pass."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradshield.data.encode import Example
from gradshield.models.batching import pad
from gradshield.models.hooks import gradients_from, linear_hooks, logits_at
from gradshield.models.load import Model
from gradshield.scoring.fihs.probe import ProbeGradient

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
        inp, out = (torch.cat([getattr(g.factors[name], side) for g in gradients]).float() for side in ("inp", "out"))
        terms = (x @ inp.T) * (delta @ out.T)  # [T, rank of all probes]
        ranks = [len(g.factors[name].inp) for g in gradients]
        parts[:, place[name]] += torch.stack([term.sum(-1) for term in terms.split(ranks, 1)]).cpu()
        norm += float(((x @ x.T) * (delta @ delta.T)).sum())  # ‖Σ_t δ_t x_tᵀ‖²

    modules = {name: model.linears[name] for name in names}
    with linear_hooks(modules, lambda _name, x: x, backward, in_place=True), gradients_from(model):
        logits = logits_at(model, ids, rows, positions).float()
        loss = torch.nn.functional.cross_entropy(logits, targets.to(logits.device), reduction="none")
        loss.sum().backward()  # not the mean, whose gradient may be too small for float16
    return parts / len(weights), norm / len(weights) ** 2


def shares(parts: Tensor) -> list[float]:
    """Each part over the sum of absolute parts."""
    return (parts / (float(parts.abs().sum()) or 1.0)).tolist()


def words(tokenizer: Any, example: Example, shares: Sequence[float], responses_only: bool = False) -> Shares:
    """Each token's text with its share; tokens that only together make a character are one.

    What the model learns at a position is to say the next token, so that is where a position's share goes if the next
    token is trained on.
    """
    ids, said = example.ids, [0.0] * len(shares)
    for place, share in enumerate(shares):
        said[place + 1 if example.mask[place + 1 : place + 2].any() else place] += share
    if responses_only:
        ids, said = ids[example.mask], [share for share, inside in zip(said, example.mask) if inside]

    def decode(part: np.ndarray) -> str:
        return tokenizer.decode(part.tolist(), clean_up_tokenization_spaces=False)

    found: list[tuple[str, float]] = []
    previous = start = 0
    for end in range(1, len(said) + 1):
        # Behind what comes before it, as some decoders drop the space that a text of its own begins with.
        text = decode(ids[previous:end])[len(decode(ids[previous:start])) :]
        if text.endswith("\ufffd") and end - start < _PIECES and end < len(said):
            continue
        found.append((text, float(sum(said[start:end]))))
        previous, start = start, end
    return tuple(found)
