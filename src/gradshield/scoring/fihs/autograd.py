"""FIHS the slow, obvious way: one row after another, its whole gradient by autograd, dense.

The tests compare every fast path with it. Only it supports g = sign (an Adam step's direction) and every weight of the
model (embeddings, norms, head). It takes about twice the time of the contraction, and the memory of three models.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradshield.base.errors import UserError
from gradshield.data.encode import Example, encode_request
from gradshield.models.batching import pad
from gradshield.models.hooks import logits_at
from gradshield.models.load import Model
from gradshield.scoring.fihs.probe import SafetyScore


def autograd_scorer(
    model: Model,
    requests: Sequence[str],
    s: SafetyScore,
    *,
    against: Sequence[str] = (),
    weights: str = "linear",
    mapping: str = "identity",
) -> Callable[[Sequence[Example]], dict[str, np.ndarray]]:
    """A scorer with the columns "score" and "paper" (⟨g(∇L), ∇S⟩, eq. 4), "loss" and "cosine".

    `weights`: "linear" (the Linears of the decoder) or "all"; `mapping` g: "identity" or "sign". ∇S is the mean over
    `requests` minus that over `against`. Raises UserError for quantised weights, which have no gradient.
    """
    chosen = weights_of(model, weights)
    query = {name: torch.zeros_like(w) for name, w in chosen.items()}
    for group, part in ((requests, 1.0), (against, -1.0)):
        for request in group:
            gradient = gradient_of(chosen, s_of(model, request, s))
            for name, g in gradient.items():
                query[name] += part / len(group) * g

    def scorer(batch: Sequence[Example]) -> dict[str, np.ndarray]:
        columns = np.zeros((3, len(batch)))
        for n, example in enumerate(batch):
            losses: list[float] = []
            gradient = gradient_of(chosen, loss_of(model, example, losses))
            if mapping == "sign":
                gradient = {name: g.sign() for name, g in gradient.items()}
            dot = sum(float((g.float() * query[name].float()).sum()) for name, g in gradient.items())
            size = sum(float(g.float().square().sum()) for g in gradient.values()) ** 0.5
            columns[:, n] = dot, losses[0], dot / max(size, np.finfo(np.float32).tiny)
        return {"score": columns[0], "paper": columns[0], "loss": columns[1], "cosine": columns[2]}

    return scorer


def weights_of(model: Model, weights: str) -> dict[str, Tensor]:
    """Name → weight of "linear" (as in `Model.linears`) or "all". Raises UserError where one can't have a gradient."""
    chosen: dict[str, Any] = dict(model.weights if weights == "linear" else model.net.named_parameters())
    fixed = [name for name, weight in chosen.items() if not weight.is_floating_point()]
    if fixed:
        raise UserError(f"{model.name}: quantised weights ({fixed[0]}) have no gradient: load it without --quantize")
    away = [name for name, weight in chosen.items() if weight.is_meta]
    if away:
        raise UserError(
            f"{model.name}: does not fit on the devices, and weights left on the CPU or disk ({away[0]}) have no "
            "gradient: leave out weights=all and mapping=sign, or use a smaller model"
        )
    return chosen


def gradient_of(weights: Mapping[str, Tensor], loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Name → dense gradient of `loss()` in the weight; zero where the loss does not depend on it."""
    for weight in weights.values():
        weight.requires_grad_(True)
    try:
        with torch.enable_grad():
            gradients = torch.autograd.grad(loss(), list(weights.values()), allow_unused=True)
    finally:
        for weight in weights.values():
            weight.requires_grad_(False)
    return {name: torch.zeros_like(w) if g is None else g for (name, w), g in zip(weights.items(), gradients)}


def s_of(model: Model, request: str, s: SafetyScore) -> Callable[[], Tensor]:
    """S at the first response position of the request (eq. 5)."""
    ids = torch.from_numpy(encode_request(request, model.tokenizer)).long().to(model.device)
    return lambda: s(logits_at(model, ids[None], torch.tensor([0]), torch.tensor([len(ids) - 1]))[0])


def loss_of(model: Model, example: Example, keep: list[float]) -> Callable[[], Tensor]:
    """Mean next-token cross-entropy of the example's response tokens; its value is appended to `keep`."""
    ids, rows, positions, targets, _ = pad([example], model.device)

    def loss() -> Tensor:
        logits = logits_at(model, ids, rows, positions).float()
        value = torch.nn.functional.cross_entropy(logits, targets.to(logits.device))
        keep.append(float(value.detach()))
        return value

    return loss
