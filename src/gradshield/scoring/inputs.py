"""Gram matrices and norms of the inputs that Linears get on rows."""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from gradshield.data.encode import Example
from gradshield.data.examples import token_counts
from gradshield.models.batching import map_by_length, pad_right
from gradshield.models.hooks import hidden_at
from gradshield.models.load import Model


@torch.no_grad()
def read_inputs(
    model: Model,
    modules: Sequence[nn.Module],
    examples: Sequence[Example],
    batch_tokens: int,
    take: Callable[[int, Tensor], None],
    *,
    responses: bool = False,
) -> None:
    """Calls `take` with the number of each module and its inputs [tokens, d_in], float32, batch by batch.

    All tokens of the rows count, or their response tokens; padding never does. A batch that does not fit into
    memory is halved; inputs that were taken before it failed are not taken twice.
    """
    taken = [Counter[int]() for _ in examples]  # of each row: how many inputs of each module

    def read(batch: Sequence[int]) -> list[None]:
        rows, calls = [examples[n] for n in batch], Counter[int]()
        counted = pad_right([e.mask if responses else np.ones_like(e.mask) for e in rows]).bool()  # [B, T]

        def see(number: int, x: Tensor) -> None:
            calls[number] += 1
            if calls[number] > taken[batch[0]][number]:  # the rows of a batch have been in the same ones before
                take(number, x[counted.to(x.device)].float())
                for n in batch:
                    taken[n][number] += 1

        def hook(number: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            return lambda _module, args: see(number, args[0])

        handles = [module.register_forward_pre_hook(hook(n)) for n, module in enumerate(modules)]
        try:
            hidden_at(model, pad_right([e.ids for e in rows]).to(model.device), [len(model.layers) - 1])
        finally:
            for handle in handles:
                handle.remove()
        return [None] * len(batch)

    map_by_length(read, token_counts(examples), batch_tokens)


def input_norms(
    model: Model, modules: Sequence[nn.Module], examples: Sequence[Example], batch_tokens: int
) -> list[Tensor]:
    """Of each module, the norm [d_in] of every input over all tokens of the examples."""
    squares: dict[int, Tensor] = {}

    def add(number: int, x: Tensor) -> None:
        squares[number] = squares.get(number, 0) + x.square().sum(0)

    read_inputs(model, modules, examples, batch_tokens, add)
    return [squares[n].sqrt() for n in range(len(modules))]


def input_grams(
    model: Model, modules: Sequence[nn.Module], examples: Sequence[Example], batch_tokens: int
) -> list[Tensor]:
    """Of each module, Σ x xᵀ [d_in, d_in] over the response tokens of the examples."""
    grams: dict[int, Tensor] = {}

    def add(number: int, x: Tensor) -> None:
        grams[number] = grams.get(number, 0) + x.T @ x

    read_inputs(model, modules, examples, batch_tokens, add, responses=True)
    return [grams[n] for n in range(len(modules))]
