"""Examples as padded tensors, batches of like length by a token budget, and recovery where one is too large."""

import logging
from collections.abc import Callable, Sequence
from math import inf
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from gradshield.base.errors import UserError, out_of_memory
from gradshield.data.encode import Example
from gradshield.data.examples import token_counts

T = TypeVar("T")
R = TypeVar("R")


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


def batches(examples: Sequence[Example], tokens: int) -> list[list[int]]:
    """Indices of examples of like length, longest first, so that rows × longest stays within `tokens` (padding
    included) wherever one row does."""
    return [batch.tolist() for batch in by_length(token_counts(examples), tokens)]


def by_length(lengths: np.ndarray, tokens: int) -> list[np.ndarray]:
    """As `batches`, from the lengths of the examples alone."""
    order = np.argsort(-lengths, kind="stable")
    result, start = [], 0
    while start < len(order):
        stop = start + max(1, tokens // max(1, int(lengths[order[start]])))
        result.append(order[start:stop])
        start = stop
    return result


def halve_to_fit(
    run: Callable[[Sequence[T]], R], tokens: Callable[[T], int], too_large: Callable[[T], str]
) -> Callable[[Sequence[T]], list[R]]:
    """`run` for batches of any size: one too large for the memory is halved until it fits, and what did not fit once
    is not tried again. Returns what `run` returns for each part, in order.

    `tokens` counts an item's tokens. Raises UserError with the text of `too_large(item)` for one that does not fit by
    itself.
    """
    room = inf  # tokens, padding included

    def fitted(batch: Sequence[T]) -> list[R]:
        nonlocal room
        size = len(batch) * max(map(tokens, batch))
        if len(batch) == 1 or size < room:
            try:
                return [run(batch)]
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                if len(batch) == 1:
                    raise UserError(too_large(batch[0])) from error
            room = min(room, size)  # outside of except, whose traceback keeps the tensors alive
            logging.getLogger("gradshield").warning("out of memory: continuing with %d rows at once", len(batch) // 2)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        middle = len(batch) // 2
        return [*fitted(batch[:middle]), *fitted(batch[middle:])]

    return fitted
