"""Greedy answers in batches: requests of like length together, and finished rows leave the batch.

A row is finished at its end-of-answer token or as soon as `stop` holds for its text. When half of the rows of a batch
are finished, they are taken out of it, out of the key-value cache as well, and the rest continues. The tokens
that all requests of a batch begin with are read once. So a batch of refusals costs little more than reading the rest.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import chain
from typing import Any
from unittest.mock import patch

import torch

from gradshield.base.errors import UserError
from gradshield.base.progress import progress
from gradshield.data.encode import encode_request
from gradshield.models.batching import halve_to_fit
from gradshield.models.load import Model

Stop = Callable[[str], bool]
"""True when nothing that may follow this beginning of an answer matters any more."""


def generate(
    model: Model,
    requests: Sequence[str],
    max_new_tokens: int = 32,
    batch: int | None = None,
    *,
    stop: Stop | None = None,
    title: str = "",
) -> list[str]:
    """Greedy answers, in the order of the requests, cut where `stop` first held. `title` shows a progress line, and
    `batch` is the rows at once (default: by the device).

    Out of memory, it continues with half as many rows at once. Raises UserError when a single row does not fit, and for
    a request that is longer than the model's positions.
    """
    encoded = [encode_request(request, model.tokenizer).tolist() for request in requests]
    longest = max(map(len, encoded), default=0)
    if model.positions is not None and longest >= model.positions:
        raise UserError(f"a request has {longest} tokens, and {model.name} {model.positions} positions; shorten it")
    return [text_of(model, ids) for ids in continue_ids(model, encoded, max_new_tokens, batch, stop=stop, title=title)]


def rows_at_once(model: Model) -> int:
    """Rows of a batch of answers. Each step reads every weight, whatever the number of rows, so many rows are faster
    even where a single forward pass is fastest with few tokens."""
    return max(32, model.batch_tokens // 64)


def text_of(model: Model, ids: Sequence[int]) -> str:
    """The answer that these token ids spell, without special tokens and outer spaces."""
    return model.tokenizer.decode(ids, skip_special_tokens=True).strip()


@torch.no_grad()
def continue_ids(
    model: Model,
    encoded: Sequence[list[int]],
    max_new_tokens: int,
    batch: int | None = None,
    *,
    stop: Stop | None = None,
    title: str = "",
) -> list[list[int]]:
    """As `generate`, but from token ids to token ids, without the end-of-answer token."""
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    answers: list[list[int]] = [[] for _ in encoded]
    batch = batch or rows_at_once(model)

    def answer(chunk: Sequence[int]) -> list[list[int]]:
        return _answer([encoded[i] for i in chunk], model, max_new_tokens, stop)

    parts = halve_to_fit(
        answer,
        lambda i: len(encoded[i]) + max_new_tokens,
        lambda i: (
            f"out of memory: a request of {len(encoded[i])} tokens with {max_new_tokens} to follow "
            "does not fit even alone; use a smaller model or --quantize"
        ),
    )
    with progress(title, 0, len(order)) if title else nullcontext(lambda *_: None) as advance:
        for start in range(0, len(order), batch):
            chunk = order[start : start + batch]
            for i, ids in zip(chunk, chain.from_iterable(parts(chunk))):
                answers[i] = ids
            advance(0, len(chunk))
    return answers


def _answer(encoded: Sequence[list[int]], model: Model, max_new_tokens: int, stop: Stop | None) -> list[list[int]]:
    """New token ids of every row, by as few calls of `generate` as rows leave in."""
    from transformers import GenerationConfig
    from transformers.generation.utils import GenerateDecoderOnlyOutput

    name = "cache" if "cache" in GenerateDecoderOnlyOutput.__dataclass_fields__ else "past_key_values"  # by version
    pad = model.tokenizer.pad_token_id
    width = max(map(len, encoded))
    finished = _StopCriterion(model, width, stop)
    # `generate` fills what is left open from the model's own config, which may penalise or forbid the likeliest token
    greedy = GenerationConfig(eos_token_id=model.net.generation_config.eos_token_id, pad_token_id=pad, do_sample=False)
    answers: list[list[int]] = [[] for _ in encoded]
    left = list(range(len(encoded)))  # which row of `encoded` each row of the batch is
    cache, shared = _read_once(encoded, model, name)
    # generation continues at the right edge, so pads go to the left, behind what is in the cache already
    ids = torch.tensor(
        [row[:shared] + [pad] * (width - len(row)) + row[shared:] for row in encoded], device=model.device
    )  # [B, T]
    mask = torch.tensor(
        [[1] * shared + [0] * (width - len(row)) + [1] * (len(row) - shared) for row in encoded], device=model.device
    )
    while left:
        with patch.object(model.net, "generation_config", greedy):
            out = model.net.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens - (ids.shape[1] - width),
                stopping_criteria=[finished],
                return_dict_in_generate=True,
                **({name: cache} if cache is not None else {}),
            )
        ids = out.sequences
        new = ids[:, width:].tolist()
        done = finished.rows(new) if len(new[0]) < max_new_tokens else [True] * len(left)
        for row, tokens in enumerate(new):
            if done[row]:
                answers[left[row]] = finished.cut(tokens)
        stay = torch.tensor([row for row, d in enumerate(done) if not d], dtype=torch.long, device=ids.device)
        left = [left[row] for row in stay.tolist()]
        mask = torch.cat([mask, mask.new_ones(len(mask), ids.shape[1] - mask.shape[1])], 1)[stay]
        ids = ids[stay]
        cache: Any = getattr(out, name, None)
        if all(hasattr(layer, "batch_select_indices") for layer in getattr(cache, "layers", [None])):
            if left:
                cache.batch_select_indices(stay.cpu())  # which fits layers on any device
        else:
            cache = None  # a state that can't be taken apart: the rest is read again from its first token
    return answers


def _read_once(encoded: Sequence[list[int]], model: Model, name: str) -> tuple[Any, int]:
    """(a cache that holds the tokens that all rows begin with, read once and repeated for each row; their number).
    Such tokens are the chat template's opening or a task's instruction. (None, 0) if it does not pay or the model keeps
    another state.
    """
    low, high = min(encoded), max(encoded)  # what these two share as lists, all do
    most = min(map(len, encoded)) - 1
    shared = next((n for n in range(most) if low[n] != high[n]), most)
    if shared < 8 or len(encoded) < 4:
        return None, 0
    out = model.net(input_ids=torch.tensor([encoded[0][:shared]], device=model.device), use_cache=True)
    cache: Any = getattr(out, name, None)
    if any(type(layer).__name__ != "DynamicLayer" for layer in getattr(cache, "layers", [None])):
        return None, 0
    cache.batch_repeat_interleave(len(encoded))
    return cache, shared


class _StopCriterion:
    """Stopping criterion of `generate`: each row at its end, and the whole batch once half of its rows are there."""

    def __init__(self, model: Model, width: int, stop: Stop | None) -> None:
        eos = model.net.generation_config.eos_token_id
        ends = eos if isinstance(eos, list) else [eos]
        self.ends = {*ends, model.tokenizer.eos_token_id, model.tokenizer.pad_token_id} - {None}
        self.model, self.width, self.stop = model, width, stop

    def rows(self, new: Sequence[list[int]]) -> list[bool]:
        """Whether each row's new tokens hold its end."""
        return [
            not self.ends.isdisjoint(tokens) or (self.stop is not None and self.stop(text_of(self.model, tokens)))
            for tokens in new
        ]

    def cut(self, tokens: list[int]) -> list[int]:
        """The tokens before the end of the answer, or before the pads that `generate` fills a finished row with."""
        return tokens[: next((n for n, token in enumerate(tokens) if token in self.ends), len(tokens))]

    def __call__(self, ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
        done = torch.tensor(self.rows(ids[:, self.width :].tolist()), device=ids.device)
        return done | (2 * done.sum() >= len(done))
