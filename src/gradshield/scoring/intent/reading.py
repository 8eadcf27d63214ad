"""The default score: does this row answer a request that the model would refuse?

Readouts of one layer's hidden states are fitted on bundled texts. Two are linear and applied at every token: `topic` is
the log-odds that the text is about something to be refused, `answer` that a response complies rather than refuses. A
third readout (kernel.py) also gives the topic of the text before a response; the mean of the two is the topic of the
request. The topic of a response is the mean of its request's topic and the highest value in the response. Its answer is
the highest value over its windows. A harmful row needs both, so its score is the smaller of the two.

A row of several turns has the score of its worst response. Text of earlier turns counts as part of the request, unless
it was refused. The cost is a forward pass up to that layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from gradshield.data.encode import Example
from gradshield.models.batching import pad
from gradshield.models.hooks import hidden_at
from gradshield.models.load import Model
from gradshield.scoring.base import Scores
from gradshield.scoring.intent.kernel import Kernel, kernel_log_odds, window_means, windows
from gradshield.scoring.intent.language import unread_languages
from gradshield.scoring.intent.spans import Response, marks_of, responses, without_turn_ends
from gradshield.scoring.intent.unreadable import (
    MIN_NATIVE_TOKEN_LENGTH,
    MIN_PROSE_TOKEN_LENGTH,
    foreign_language_reason,
    hidden_words_reason,
    plain_example,
    token_length,
)

DEPTH = 0.5  # of the decoder's blocks: where the readouts read
# Tokens that log-odds are averaged over. In narrow windows a word may be high by chance, in wide ones a sentence is
# diluted, so in a response the mean of two widths counts (docs/log.md).
CONTEXT_WINDOW, RESPONSE_WINDOWS, ANSWER_WINDOW = 8, (4, 32), 8
LATER_WINDOW_PENALTY = 1.0  # taken off the log-odds of all windows but the first: of many, one is high by chance
MIN_SHARED_TOKENS = 8  # of an opening that all rows of a batch have, from which it pays to compute it once


@dataclass(frozen=True)
class Readouts:
    """Log-odds of a token = state · weight + bias, where the state is the output of block `layer`, at length 1."""

    layer: int
    weight: np.ndarray  # float64 [d, 2]: topic, answer
    bias: np.ndarray  # float64 [2]
    kernel: Kernel  # the topic of a response's context
    ability: np.ndarray = field(default_factory=lambda: np.empty(0))  # how well each of `languages()` is read


@dataclass(frozen=True)
class ReadRow:
    """The readouts' log-odds for a row."""

    tokens: np.ndarray  # float64 [tokens, 2]: topic, answer
    responses: list[Response]
    asked: np.ndarray  # float64 [responses]: the highest of the kernel's log-odds over each one's context


def scored_part(model: Model, examples: Sequence[Example]) -> list[Example]:
    """The part of the examples that the score reads: up to the last response's last word."""
    ends = marks_of(model.tokenizer).ends
    return [without_turn_ends(e, ends) for e in examples]


def read_layer(model: Model) -> int:
    """The decoder block whose output is read."""
    return int(DEPTH * len(model.layers))


def read_batch(model: Model, readouts: Readouts, batch: Sequence[Example]) -> list[ReadRow]:
    """What the readouts say of each row of the batch."""
    ids, *_ = pad(batch, model.device)
    marks = marks_of(model.tokenizer)
    shared = shared_opening(ids)
    (hidden,) = hidden_at(model, ids, [readouts.layer], shared)
    parts = [unit_length(hidden)]
    if shared:  # computed once, so read once
        (opening,) = hidden_at(model, ids[:1, :shared], [readouts.layer])
        parts.append(unit_length(opening))
    weight = torch.from_numpy(readouts.weight).float().to(hidden.device)
    rest, *first = [(part @ weight).cpu().double().numpy() + readouts.bias for part in parts]
    states = torch.cat([part.flatten(0, 1) for part in parts])
    found = [responses(example, marks) for example in batch]
    places, of = [], []
    for n, own in enumerate(found):
        for response in own:
            at = response.context  # in `states`, the opening stands behind the rows
            at = np.where(at < shared, len(batch) * len(rest[0]) + at, n * len(rest[0]) + at - shared)
            own_windows = windows(at)
            places += own_windows
            of.append(len(own_windows))
    values = kernel_log_odds(readouts.kernel, window_means(states, places))
    highest = np.maximum.reduceat(values, np.cumsum([0, *of[:-1]]))
    asked = np.split(highest, np.cumsum([len(own) for own in found])[:-1])
    return [
        ReadRow(np.concatenate([*(each[0] for each in first), row[: len(example.ids) - shared]]), own, a)
        for example, row, own, a in zip(batch, rest, found, asked)
    ]


def shared_opening(ids: Tensor) -> int:
    """How many tokens all rows of the batch [B, T] open with, if it pays to compute them once, else 0."""
    same = (ids == ids[0]).all(0)
    count = min(int(torch.argmin(torch.cat([same, same.new_zeros(1)]).int())), ids.shape[1] - 1)
    return count if len(ids) > 1 and count >= MIN_SHARED_TOKENS else 0


def unit_length(hidden: Tensor) -> Tensor:
    """Vectors [..., d] at length 1 (or 0), float32."""
    return torch.nn.functional.normalize(hidden.float(), dim=-1)


def asked_topic(tokens: np.ndarray, response: Response) -> float:
    """The linear topic of the context of a response, from the log-odds [tokens, 2] of its row."""
    return float(running_mean(tokens[response.context, 0], CONTEXT_WINDOW).max())


def said_topic(tokens: np.ndarray, response: Response) -> float:
    """The topic of a response itself."""
    inside = tokens[response.start : response.stop, 0]
    return float(np.mean([running_mean(inside, width).max() for width in RESPONSE_WINDOWS]))


def answer_of(tokens: np.ndarray, response: Response) -> float:
    """Log-odds that a response complies rather than refuses."""
    windows = running_mean(tokens[response.start : response.stop, 1], ANSWER_WINDOW)
    return float(max(windows[0], (windows[1:] - LATER_WINDOW_PENALTY).max(initial=-np.inf)))


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Means over every `width` successive values; of fewer values, the one mean."""
    width = min(width, len(values))
    total = np.concatenate(([0.0], np.cumsum(values)))
    return (total[width:] - total[:-width]) / width


def row_scores(row: ReadRow) -> tuple[float, float, float]:
    """(score, topic, answer) of a row: those of its response with the highest score.

    A request may be put off, or the assistant may state it, and a later turn says no more than "go ahead". So what was
    asked and said before counts as asked, unless it was refused.
    """
    each, before = [], -np.inf
    for response, kernel in zip(row.responses, row.asked):
        asked, said, answer = (read(row.tokens, response) for read in (asked_topic, said_topic, answer_of))
        asked = (asked + float(kernel)) / 2
        topic = (max(asked, before) + said) / 2
        each.append((min(topic, answer), topic, answer))
        if answer > 0:
            before = max(before, asked, said)
    return max(each)


def intent_scores(model: Model, readouts: Readouts, batch: Sequence[Example]) -> Scores:
    """Columns "score", "topic" and "answer" [B]. Rows whose letters hide their words are also read in plain letters,
    and the higher score counts. Rows that can't be read have a reason."""
    tokenizer = model.tokenizer
    cut = scored_part(model, batch)
    rows = _score_batch(model, readouts, cut)
    reasons: dict[int, str] = {}
    unread = unread_languages(readouts.ability)
    for n, example in enumerate(cut):
        length, why = token_length(example, tokenizer), None
        if length < MIN_PROSE_TOKEN_LENGTH:
            plain = plain_example(example, tokenizer)
            if plain is not None:
                rows[n] = max(rows[n], *_score_batch(model, readouts, [plain]))
                example = plain
            why = hidden_words_reason(example, tokenizer)
        if unread and length < MIN_NATIVE_TOKEN_LENGTH:
            why = why or foreign_language_reason(example, tokenizer, unread)
        if why:
            reasons[n] = why
    return Scores(dict(zip(("score", "topic", "answer"), np.array(rows).T)), reasons)


def _score_batch(model: Model, readouts: Readouts, rows: Sequence[Example]) -> list[tuple[float, float, float]]:
    return [row_scores(row) for row in read_batch(model, readouts, rows)]
