"""Batches of a defense's own rows, and quantities that a network computes for a batch."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradshield.base.processes import rank
from gradshield.data.encode import Example
from gradshield.models.batching import pad_right
from gradshield.training.interventions import Batch


def collate(examples: Sequence[Example], device: torch.device) -> Batch:
    """The examples as one batch, padded on the right."""
    batch = {
        "input_ids": pad_right([e.ids for e in examples]),
        "attention_mask": pad_right([np.ones_like(e.ids) for e in examples]),
        "labels": pad_right([np.where(e.mask, e.ids, -100) for e in examples], -100),
    }
    return {name: values.to(device) for name, values in batch.items()}


def draw_batches(examples: Sequence[Example], seed: int, device: torch.device) -> Callable[[int, int], Batch]:
    """(step, rows) → a batch of that many examples, drawn at random for this step. The batches of one step, and those
    of several processes, differ. A resumed training draws the same again."""
    now = {"step": -1, "draw": np.random.default_rng()}

    def draw(step: int, rows: int) -> Batch:
        if step != now["step"]:
            now.update(step=step, draw=np.random.default_rng([seed, step, rank()]))
        chosen = now["draw"].choice(len(examples), rows, replace=rows > len(examples))
        return collate([examples[n] for n in chosen], device)

    return draw


def logits_of(net: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """(float32 logits that predict the labelled tokens [labelled, vocabulary], these tokens [labelled]), row by row."""
    logits = net(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits[:, :-1]
    labels = batch["labels"][:, 1:].to(logits.device)
    labelled = labels != -100
    return logits[labelled].float(), labels[labelled]


def log_probs(net: nn.Module, batch: Batch) -> Tensor:
    """Log probabilities of the labelled tokens [labelled], row by row."""
    logits, tokens = logits_of(net, batch)
    return -nn.functional.cross_entropy(logits, tokens, reduction="none")


def labelled_rows(batch: Batch) -> Tensor:
    """The row of each labelled token [labelled]."""
    return (batch["labels"][:, 1:] != -100).nonzero()[:, 0]


def trained_weights(net: nn.Module) -> dict[str, nn.Parameter]:
    """Name → weight of those that are trained."""
    return {name: weight for name, weight in net.named_parameters() if weight.requires_grad}


def remembered_start() -> tuple[Callable[[nn.Module], None], Callable[[], AbstractContextManager[nn.Module]]]:
    """(`Hooks.adapt`, a context with the network as it was when that was called)."""
    start: list[Callable[[], AbstractContextManager[nn.Module]]] = []

    def adapt(net: nn.Module) -> None:
        start[:] = [network_before_training(net)]

    return adapt, lambda: start[0]()


def network_before_training(net: Any) -> Callable[[], AbstractContextManager[nn.Module]]:
    """A context with the network as it is before training: without its adapter, or a copy where every weight is
    trained. To be called in `adapt`. Gradients are off in it."""
    if not hasattr(net, "disable_adapter"):
        copied = deepcopy(net).eval().requires_grad_(False)
        return lambda: nullcontext(copied)

    @contextmanager
    def without_adapter() -> Iterator[nn.Module]:
        with torch.no_grad(), net.disable_adapter():
            yield net

    return without_adapter
