"""The default score: does this row answer what the model would refuse?

Two linear readouts of one layer's hidden states are fitted on bundled texts and read at every token. `topic` is the
log-odds that the text is about something to be refused, `answer` that a response complies rather than refuses. The
topic of a response is the mean of two numbers: the highest value in the text before it, and the highest value in the
response. Its answer is the highest value over its windows. A row is harmful when both hold, so its score is the smaller
of the two. A row of several turns scores as its worst response, and what was asked or said in earlier turns, and not
refused, counts as asked. The cost is a forward pass up to that layer.
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
    ability: np.ndarray = field(default_factory=lambda: np.empty(0))  # how well each of `languages()` is read


def scored_part(model: Model, examples: Sequence[Example]) -> list[Example]:
    """What the score reads of the examples: up to the last response's last word."""
    ends = marks_of(model.tokenizer).ends
    return [without_turn_ends(e, ends) for e in examples]


def read_layer(model: Model) -> int:
    """The decoder block whose output is read."""
    return int(DEPTH * len(model.layers))


def token_scores(model: Model, readouts: Readouts, batch: Sequence[Example]) -> list[np.ndarray]:
    """Log-odds [tokens, 2] (topic, answer) of every token of each row of the batch."""
    ids, *_ = pad(batch, model.device)
    weight = torch.from_numpy(readouts.weight).float()

    def read(ids: Tensor, shared: int = 0) -> np.ndarray:
        (hidden,) = hidden_at(model, ids, [readouts.layer], shared)
        return (unit_length(hidden) @ weight.to(hidden.device)).cpu().double().numpy() + readouts.bias

    shared = shared_opening(ids)
    scores = read(ids, shared)
    if shared:  # computed once, so read once
        opening = read(ids[:1, :shared])
        scores = np.concatenate([np.repeat(opening, len(batch), 0), scores], 1)
    return [row[: len(e.ids)] for row, e in zip(scores, batch)]


def shared_opening(ids: Tensor) -> int:
    """How many tokens all rows of the batch [B, T] open with, if it pays to compute them once, else 0."""
    same = (ids == ids[0]).all(0)
    count = min(int(torch.argmin(torch.cat([same, same.new_zeros(1)]).int())), ids.shape[1] - 1)
    return count if len(ids) > 1 and count >= MIN_SHARED_TOKENS else 0


def unit_length(hidden: Tensor) -> Tensor:
    """Vectors [..., d] at length 1 (or 0), float32."""
    return torch.nn.functional.normalize(hidden.float(), dim=-1)


def asked_topic(tokens: np.ndarray, response: Response) -> float:
    """The topic of what stands in front of a response, from the log-odds [tokens, 2] of its row."""
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


def row_scores(tokens: np.ndarray, found: Sequence[Response]) -> tuple[float, float, float]:
    """(score, topic, answer) of a row: those of its response with the highest score.

    A request may be put off, or the assistant may state it, and a later turn says no more than "go ahead". So what was
    asked and said before counts as asked, unless it was refused.
    """
    each, before = [], -np.inf
    for response in found:
        asked, said, answer = (read(tokens, response) for read in (asked_topic, said_topic, answer_of))
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
    marks = marks_of(model.tokenizer)
    return [row_scores(t, responses(e, marks)) for t, e in zip(token_scores(model, readouts, rows), rows)]
