"""The default score: does this row answer what the model would refuse?

Two readouts of the middle layers' hidden states, both linear, both fitted on the bundled anchors for the model at hand:
*request*, the log-odds that what stands in front of the response is a request to be refused, read at the request's own
last token and at the last one of the prompt, and *answer*, the log-odds that the response complies rather than refuses,
the highest over its windows (less one for all but the first); each is the mean over five layers. A row is harmful when
both hold, so its score is the smaller of the two; a row of several turns scores as its worst. It needs a forward pass
to the highest of the layers and nothing else (method 5c; docs/results).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradshield.base.progress import progress
from gradshield.data.encode import Example, encode_prompt, end_of_request
from gradshield.models.batching import pad
from gradshield.models.hooks import hidden_at
from gradshield.models.load import Model
from gradshield.scoring.engine import batches, fitting
from gradshield.scoring.intent.windows import end_tokens, spoken, windows

DEPTHS = (0.5, 0.55, 0.6, 0.65, 0.7)  # of the blocks; where exactly matters little, their mean is steadier than any
LATER = 1.0  # how much surer a window behind the first must be: of many, one is high by chance (docs/log.md)
SHARED = 8  # tokens that all rows must open with before it pays to compute them once


@dataclass(frozen=True)
class Readout:
    """log-odds = states · weight + bias, for states side by side [states * d], each of unit length."""

    weight: np.ndarray  # float64 [states * d]
    bias: float

    def __call__(self, states: np.ndarray) -> np.ndarray:
        return states @ self.weight + self.bias

    def of(self, states: Tensor) -> np.ndarray:
        """The same for states [N, states * d] on a device, which leave it as one number each."""
        weight = torch.from_numpy(self.weight).to(states)
        return (states @ weight).cpu().double().numpy() + self.bias  # mps knows no float64


@dataclass(frozen=True)
class Intent:
    """The two readouts of a model, and where they read."""

    layers: tuple[int, ...]
    closing: tuple[int, ...]  # ids that the template puts between a request's own last token and the response
    request: Readout
    answer: Readout


def seen(model: Model, examples: Sequence[Example]) -> list[Example]:
    """What the score reads of the examples: up to the last response's last word."""
    ends = end_tokens(model.tokenizer)
    return [spoken(e, ends) for e in examples]


@dataclass(frozen=True)
class States:
    """Hidden states of a batch's R responses and their W windows, as a unit vector of each layer."""

    request: Tensor  # float32 [R, 2 * layers * d]: in front of a response's first token, and the request's own last one
    owner: np.ndarray  # [R] the index of its example
    window: Tensor  # float32 [W, layers * d]: the mean over a window's tokens
    response: np.ndarray  # [W] the index of its response, ascending
    start: np.ndarray  # [W] its first token's position in the row


def states(model: Model, batch: Sequence[Example], layers: Sequence[int], closing: Sequence[int]) -> States:
    """The states that the score reads of the batch, at the outputs of the decoder blocks `layers`; `closing` as in
    `Intent`."""
    cut = seen(model, batch)
    ids, *_ = pad(cut, model.device)
    responses = [(n, spans) for n, example in enumerate(cut) for spans in windows(example.mask)]
    owner = np.array([n for n, _ in responses])
    own = np.array([end_of_request(cut[n].ids, spans[0][0], closing) for n, spans in responses])
    hidden, first = _hidden(model, ids, layers, int(own.min()))
    response = np.repeat(np.arange(len(responses)), [len(spans) for _, spans in responses])
    start, stop = np.array([span for _, spans in responses for span in spans]).T
    before = np.array([spans[0][0] - 1 for _, spans in responses])
    request = _asked(model, hidden, owner, before - first, own - first)
    window = _side_by_side(model, (_mean(h, owner[response], start - first, stop - first) for h in hidden))
    return States(request, owner, window, response, start)


def request_states(model: Model, requests: Sequence[str], layers: Sequence[int], closing: Sequence[int]) -> np.ndarray:
    """The states [N, 2 * layers * d] that tell what is asked for, as in `States.request`."""
    encoded = [encode_prompt(r, model.tokenizer) for r in requests]
    own = np.array([end_of_request(ids, len(ids), closing) for ids in encoded])
    examples = [Example(n, ids, np.arange(len(ids)) > 0) for n, ids in enumerate(encoded)]
    rows = np.zeros((len(encoded), 2 * len(layers) * width_of(model)))

    @fitting
    def read(batch: Sequence[Example]) -> dict[str, np.ndarray]:
        ids, *_ = pad(batch, model.device)
        last, where = np.array([len(e.ids) - 1 for e in batch]), own[[e.row for e in batch]]
        hidden, first = _hidden(model, ids, layers, int(where.min()))
        return {"states": _asked(model, hidden, np.arange(len(batch)), last - first, where - first).cpu().numpy()}

    with progress("requests", 0, len(examples)) as advance:
        for batch in batches(examples, 2048):
            rows[batch] = read([examples[n] for n in batch])["states"]
            advance(0, len(batch))
    return rows


def intent_scores(model: Model, intent: Intent, batch: Sequence[Example]) -> dict[str, np.ndarray]:
    """Columns "score", "request" and "answer" [B]: of each row, its response with the highest score, and of that one
    the window that complies most."""
    read = states(model, batch, intent.layers, intent.closing)
    request, answer = intent.request.of(read.request), highest(intent.answer.of(read.window), read.response)
    score = np.minimum(request, answer)
    order = np.lexsort((score, read.owner))  # the last of every owner is its highest
    worst = order[np.append(np.flatnonzero(np.diff(read.owner[order])), len(order) - 1)]
    return {"score": score[worst], "request": request[worst], "answer": answer[worst]}


def highest(values: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """The highest value of each owner's windows, those behind its first less LATER; `owner` counts up from 0."""
    first = np.diff(owner, prepend=-1) > 0
    return np.maximum.reduceat(np.where(first, values, values - LATER), np.flatnonzero(first))


def _hidden(model: Model, ids: Tensor, layers: Sequence[int], wanted: int) -> tuple[list[Tensor], int]:
    """(a state [B, T − first, d] of each layer from position `first` on, `first`); no state in front of position
    `wanted` is asked for. What all rows open with, such as a system prompt, is computed once for all of them."""
    same = (ids == ids[0]).all(0)
    shared = min(int(torch.argmin(torch.cat([same, same.new_zeros(1)]).int())), wanted)
    first = shared if len(ids) > 1 and shared >= SHARED else 0
    return hidden_at(model, ids, layers, first), first


def _asked(model: Model, hidden: Sequence[Tensor], row: np.ndarray, before: np.ndarray, own: np.ndarray) -> Tensor:
    """[N, 2 * layers * d]: of the last prompt token, at hidden[row, before], and of the request's own last one."""
    return _side_by_side(model, (_mean(h, row, at, at + 1) for at in (before, own) for h in hidden))


def _mean(hidden: Tensor, row: np.ndarray, start: np.ndarray, stop: np.ndarray) -> Tensor:
    """Means [N, d] over hidden[row, start:stop] of [B, T, d], float32; each span is of WINDOW tokens at most."""
    rows, first, end = (torch.from_numpy(a).to(hidden.device) for a in (row, start, stop))
    total = hidden[rows, first].float()
    for n in range(1, int(np.max(stop - start))):
        inside = (first + n < end)[:, None]
        total += torch.where(inside, hidden[rows, torch.minimum(first + n, end - 1)].float(), 0)
    return total / (end - first)[:, None]


def _side_by_side(model: Model, states: Iterable[Tensor]) -> Tensor:
    """[N, d] of each → [N, states * d] on the model's device, every part of unit length."""
    return torch.cat([(h / h.norm(dim=-1, keepdim=True)).to(model.device) for h in states], 1)


def width_of(model: Model) -> int:
    """d, also of a model whose config has one part for text and another for images."""
    return model.net.config.get_text_config().hidden_size
