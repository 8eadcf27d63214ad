"""Helpers for many baselines: hidden states at one position of each row, and their cosines."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from gradshield.base.progress import progress
from gradshield.data.encode import Example
from gradshield.data.examples import token_counts
from gradshield.models.batching import map_by_length, pad
from gradshield.models.hooks import hidden_at
from gradshield.models.load import Model

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

    def read(batch: Sequence[int]) -> np.ndarray:
        return states_at(model, [examples[n] for n in batch], layers, place).transpose(0, 1).numpy()

    with progress("reading states", 0, len(examples)) as advance:
        return np.stack(map_by_length(read, token_counts(examples), batch_tokens, advance=advance), axis=1)


def cosine(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Cosines [N, M] of the rows of [N, d] and [M, d]; 0 where a row is all zero."""
    one, other = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (one, other))
    return np.asarray(one, dtype=np.float64) @ np.asarray(other, dtype=np.float64).T


def layer_of(model: Model, layer: int | None) -> int:
    """The index of a decoder block: `layer` within the model's range, or the middle one."""
    count = len(model.layers)
    return count // 2 if layer is None else min(max(layer, 0), count - 1)


def _at(hidden: Tensor, batch: Sequence[Example], place: Place) -> Tensor:
    if place == "response":
        return torch.stack(
            [h[torch.from_numpy(np.flatnonzero(e.mask)).to(h.device)].float().mean(0) for h, e in zip(hidden, batch)]
        ).cpu()
    where = [len(e.ids) - 1 if place == "last" else max(0, int(e.mask.argmax()) - 1) for e in batch]
    return hidden[torch.arange(len(batch)), torch.tensor(where)].float().cpu()
