"""Padded tensors, batches of like length by a token budget, and recovery from running out of memory."""

import logging
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from math import inf
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from gradshield.base.errors import UserError, out_of_memory
from gradshield.data.encode import Example
from gradshield.data.examples import token_counts
from gradshield.models.hooks import logits_at
from gradshield.models.load import Model

T = TypeVar("T")
R = TypeVar("R")


def pad_right(rows: Sequence[np.ndarray], value: int = 0) -> Tensor:
    """The rows as one int64 tensor [B, T], filled up on the right with `value`."""
    return pad_sequence([torch.from_numpy(row).long() for row in rows], batch_first=True, padding_value=value)


def pad(batch: Sequence[Example], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(ids [B, T] padded on the right, and for each response token its row, the position that predicts it, its id,
    and 1 / number of its row's response tokens)."""
    ids = pad_right([example.ids for example in batch])
    rows, positions, targets, weights = [], [], [], []
    for row, example in enumerate(batch):
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


def losses(model: Model, batch: Sequence[Example]) -> Tensor:
    """Mean next-token cross-entropy [B] of each row's response tokens, in nats, on the CPU; autograd follows it."""
    ids, rows, positions, targets, weights = pad(batch, model.device)
    logits = logits_at(model, ids, rows, positions).float()
    each = torch.nn.functional.cross_entropy(logits, targets.to(logits.device), reduction="none").cpu()
    return torch.zeros(len(batch)).index_add(0, rows.cpu(), each * weights)


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


def map_by_length(
    run: Callable[[Sequence[int]], Iterable[R]],
    lengths: Sequence[int] | np.ndarray,
    tokens: int,
    *,
    item: str = "row",
    fix: str = "lower --max-length",
    advance: Callable[[int, int], None] = lambda *_: None,
) -> list[R]:
    """`run` on all items, in batches of like length: it takes the indices of a batch and returns a result for each.
    Returns the results in the order of the items.

    `lengths` are the items' tokens, and a batch has at most `tokens`, padding included. A batch that does not fit into
    memory is halved (`halve_to_fit`). `advance(0, items)` is called after each batch.
    Raises UserError, with the advice `fix`, when a single item does not fit.
    """
    found: dict[int, R] = {}
    parts = halve_to_fit(
        run,
        lambda n: int(lengths[n]),
        lambda n: f"out of memory: a {item} of {lengths[n]} tokens does not fit even alone; {fix}",
    )
    for batch in by_length(np.asarray(lengths), tokens):
        found.update(zip(batch.tolist(), chain.from_iterable(parts(batch.tolist())), strict=True))
        advance(0, len(batch))
    return [found[n] for n in range(len(lengths))]


def halve_to_fit(
    run: Callable[[Sequence[T]], R], tokens: Callable[[T], int], too_large: Callable[[T], str]
) -> Callable[[Sequence[T]], list[R]]:
    """`run` for batches of any size. A batch that does not fit into memory is halved until it does, and a size that
    failed once is not tried again. Returns the results of `run` for the parts, in order.

    `tokens` counts an item's tokens. Raises UserError with the text of `too_large(item)` if a single one does not fit.
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
