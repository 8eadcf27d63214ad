"""What Linears are given on rows: Gram matrices and norms of their inputs."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from gradshield.data.encode import Example
from gradshield.models.batching import batches, pad
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

    All tokens of the rows count, or their response tokens; padding never does.
    """
    counted = torch.empty(0)

    def hook(number: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, args: take(number, args[0][counted.to(args[0].device)].float())

    handles = [module.register_forward_pre_hook(hook(n)) for n, module in enumerate(modules)]
    try:
        for batch in batches(examples, batch_tokens):
            rows = [examples[n] for n in batch]
            ids, *_ = pad(rows, model.device)
            counted = torch.zeros(ids.shape, dtype=torch.bool)  # [B, T]
            for row, example in enumerate(rows):
                mask = example.mask if responses else np.ones(len(example.ids), dtype=bool)
                counted[row, : len(mask)] = torch.from_numpy(mask)
            hidden_at(model, ids, [len(model.layers) - 1])
    finally:
        for handle in handles:
            handle.remove()


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
