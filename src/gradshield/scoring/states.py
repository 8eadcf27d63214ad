"""Helpers for many baselines: hidden states at one position of each row, and the loss of the response."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from gradshield.base.progress import progress
from gradshield.data.encode import Example
from gradshield.models.batching import batches, pad
from gradshield.models.hooks import hidden_at, logits_at
from gradshield.models.load import Model
from gradshield.scoring.engine import fit_to_memory

Place = Literal["last", "prompt", "response"]
"""The row's last token, the last token in front of its first response, or the mean over its response tokens."""


def states_at(model: Model, batch: Sequence[Example], layers: Sequence[int], place: Place) -> Tensor:
    """Outputs [layers, B, d] of the decoder blocks `layers` (ascending, as for `hidden_at`) at one place of each row,
    float32, CPU."""
    ids, *_ = pad(batch, model.device)
    return torch.stack([_at(hidden, batch, place) for hidden in hidden_at(model, ids, layers)])


def read_states(
    model: Model, examples: Sequence[Example], layers: Sequence[int], place: Place, batch_tokens: int
) -> np.ndarray:
    """`states_at` of any number of rows: float32 [layers, N, d]."""
    found: dict[int, np.ndarray] = {}

    @fit_to_memory
    def read(batch: Sequence[Example]) -> dict[str, np.ndarray]:
        return {"states": states_at(model, batch, layers, place).transpose(0, 1).numpy()}

    with progress("reading states", 0, len(examples)) as advance:
        for batch in batches(examples, batch_tokens):
            found |= dict(zip(batch, read([examples[n] for n in batch])["states"]))
            advance(0, len(batch))
    return np.stack([found[n] for n in range(len(examples))], axis=1)


def losses(model: Model, batch: Sequence[Example]) -> Tensor:
    """Mean next-token cross-entropy [B] of each row's response tokens, in nats, on the CPU; autograd follows it."""
    ids, rows, positions, targets, weights = pad(batch, model.device)
    logits = logits_at(model, ids, rows, positions).float()
    each = torch.nn.functional.cross_entropy(logits, targets.to(logits.device), reduction="none").cpu()
    return torch.zeros(len(batch)).index_add(0, rows.cpu(), each * weights)


def cosine(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Cosines [N, M] of the rows of [N, d] and [M, d]; 0 where a row is all zero."""
    one, other = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (one, other))
    return np.asarray(one, dtype=np.float64) @ np.asarray(other, dtype=np.float64).T


def layer_of(model: Model, layer: int | None, depth: float = 0.5) -> int:
    """The index of a decoder block: the one asked for, or the one at this share of the depth."""
    count = len(model.layers)
    return int(depth * count) if layer is None else min(max(layer, 0), count - 1)


def _at(hidden: Tensor, batch: Sequence[Example], place: Place) -> Tensor:
    if place == "response":
        return torch.stack(
            [h[torch.from_numpy(np.flatnonzero(e.mask)).to(h.device)].float().mean(0) for h, e in zip(hidden, batch)]
        ).cpu()
    where = [len(e.ids) - 1 if place == "last" else max(0, int(e.mask.argmax()) - 1) for e in batch]
    return hidden[torch.arange(len(batch)), torch.tensor(where)].float().cpu()
