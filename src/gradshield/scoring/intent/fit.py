"""Fits the readouts of `intent` for a model, and scores the bundled rows out of fold."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from gradshield.base.errors import UserError
from gradshield.base.progress import progress
from gradshield.data.encode import Example
from gradshield.data.examples import token_counts
from gradshield.models.batching import batches, pad
from gradshield.models.hooks import hidden_at
from gradshield.models.load import Model
from gradshield.scoring.cache import kept_part
from gradshield.scoring.engine import fit_to_memory
from gradshield.scoring.intent.corpus import Text
from gradshield.scoring.intent.kernel import Kernel, similarities, window_means, windows
from gradshield.scoring.intent.language import reading_ability, unread_languages
from gradshield.scoring.intent.reading import (
    ANSWER_WINDOW,
    Readouts,
    ReadRow,
    asked_topic,
    read_layer,
    row_scores,
    scored_part,
    shared_opening,
    unit_length,
)
from gradshield.scoring.intent.spans import Response, marks_of, opening_size, responses

FOLDS = 4
REGULARISATION = 1.0  # C of the linear readouts, on standardised states (docs/log.md)
KERNEL_REGULARISATION = 3.0  # C of the kernel's
LANDMARKS = 1024  # half of them from harmful texts
VARIANCE_FLOOR = 0.01  # of the mean variance, added to that of every dimension
FIT_WINDOWS = 2, 8  # tokens that a vector is the mean of, before a response and in it (docs/log.md)
STRIDE = 2  # tokens between the running means that are fitted on


@dataclass(frozen=True)
class Bags:
    """Sets of vectors with a label each: a set is positive where any of its vectors is."""

    x: Tensor  # float32 [vectors, d]
    of: Tensor  # int64 [vectors]: the bag of each, ascending
    label: Tensor  # bool [bags]
    fold: Tensor  # int64 [bags]


@dataclass(frozen=True)
class _Row:
    text: Text
    example: Example
    response: Response


def fit_readouts(
    model: Model, texts: Sequence[Text], batch_tokens: int, folder: Path
) -> tuple[Readouts, dict[str, np.ndarray]]:
    """The readouts, each the mean of one fit per fold, and the scores of the rows among the texts by kind. The states
    that were read are saved in `folder`: an interrupted fit resumes from it.

    A row is scored by the fit that has not seen its words in any form. So is how well each language is read. Texts in a
    language that the model can't read are noise: once that is known, the readouts are fitted without them.
    """
    marks = marks_of(model.tokenizer)
    layer = read_layer(model)
    rows = [
        _Row(text, example, responses(example, marks)[-1]) for text, example in zip(texts, _scored_parts(model, texts))
    ]
    states = _states(model, [row.example for row in rows], layer, batch_tokens, folder)
    middle, scale = _spread(states)
    for n, each in enumerate(states):
        states[n] = ((each - middle) / scale).astype(np.float16)
    fold = _folds([text.words for text in texts])
    topic = _fits(_topic_bags(rows, states, fold), soft=True, c=REGULARISATION)
    ability = reading_ability(_asked(rows, states, fold, topic))
    unread = unread_languages(ability)
    if unread:
        kept = [n for n, row in enumerate(rows) if row.text.language not in unread]
        rows, states, fold = [rows[n] for n in kept], [states[n] for n in kept], fold[kept]
        topic = _fits(_topic_bags(rows, states, fold), soft=True, c=REGULARISATION)
    answer = _fits(_answer_bags(rows, states, fold), soft=False, c=REGULARISATION)
    fits = np.stack([topic, answer], 2)
    kernel, asked = _fit_kernel(rows, states, fold)
    scores: dict[str, list[float]] = {"good": [], "refusal": [], "harmful": []}
    for row, held, n, near in zip(rows, states, fold, asked):
        if row.text.kind in scores and not row.text.language:
            tokens = held @ fits[n, :-1] + fits[n, -1]
            read = ReadRow(tokens, [_place(row, held)], np.array([near]))
            scores[row.text.kind].append(row_scores(read)[0])
    mean = fits.mean(0)
    weight = mean[:-1] / scale[:, None]  # of states that are not standardised
    kernel = replace(kernel, middle=middle + scale * kernel.middle, scale=scale * kernel.scale)
    readouts = Readouts(layer, weight, mean[-1] - middle @ weight, kernel, ability)
    return readouts, {kind: np.array(values) for kind, values in scores.items()}


def _fit_kernel(rows: Sequence[_Row], states: Sequence[np.ndarray], fold: np.ndarray) -> tuple[Kernel, np.ndarray]:
    """(the kernel readout of standardised states, its log-odds [rows] for the context of each response). Each row's
    log-odds are out-of-fold."""
    means, labels, folds, before = [], [], [], []
    for row, held, own in zip(rows, states, fold):
        before.append(len(means))
        for piece in _pieces(row, held):
            if len(piece):
                means.append(window_means(torch.from_numpy(piece), windows(np.arange(len(piece)))).half())
                labels.append(row.text.harmful)
                folds.append(own)
    middle, scale = _spread([each.numpy() for each in means])
    offset, width = (torch.from_numpy(each).float() for each in (middle, scale))
    harmful = torch.repeat_interleave(torch.tensor(labels), torch.tensor([len(each) for each in means]))
    everything = torch.cat(means)
    rng = np.random.default_rng(0)
    drawn = [
        rng.permutation(np.flatnonzero(harmful.numpy() == side))[: LANDMARKS // 2].tolist() for side in (True, False)
    ]
    landmarks = (everything[[*drawn[0], *drawn[1]]].float() - offset) / width
    landmarks = landmarks.half().float()  # as they are kept
    values, vectors = torch.linalg.eigh(similarities(landmarks, landmarks).double())
    whiten = (vectors / values.clamp(min=1e-6 * values[-1]).sqrt()).float()
    near = [similarities((each.float() - offset) / width, landmarks) @ whiten for each in means]
    bags = _make_bags([each.numpy() for each in near], labels, folds)
    fits = _fits(bags, soft=True, c=KERNEL_REGULARISATION)
    asked = [float((near[at].double().numpy() @ fits[n, :-1] + fits[n, -1]).max()) for at, n in zip(before, fold)]
    mean = fits.mean(0)
    strength = whiten.double().numpy() @ mean[:-1]
    return Kernel(middle, scale, landmarks.half().numpy(), strength, float(mean[-1])), np.array(asked)


def _pieces(row: _Row, held: np.ndarray) -> list[np.ndarray]:
    """The states of the context of the row's response, and, if it complies, those of the response."""
    here = _place(row, held)
    pieces = [held[here.context]]
    if row.text.kind in ("good", "harmful"):
        before = len(row.example.ids) - len(held)
        pieces.append(held[max(here.start, row.text.turn - 3 - before) :])
    return pieces


def _asked(
    rows: Sequence[_Row], states: Sequence[np.ndarray], fold: np.ndarray, topic: np.ndarray
) -> list[tuple[str, bool, float]]:
    """(language, is it harmful, topic) of each request in a known language, from the topic's fits [folds, d + 1]."""
    found = []
    for row, held, n in zip(rows, states, fold):
        if row.text.language:
            tokens = (held @ topic[n, :-1] + topic[n, -1])[:, None]
            found.append((row.text.language, row.text.harmful, asked_topic(tokens, _place(row, held))))
    return found


def _place(row: _Row, held: np.ndarray) -> Response:
    """The row's response, as positions in its states, which begin after the opening that all texts share."""
    before = len(row.example.ids) - len(held)
    context = row.response.context - before
    return Response(context[context >= 0], row.response.start - before, len(held))


def _scored_parts(model: Model, texts: Sequence[Text]) -> list[Example]:
    return scored_part(model, [text.example for text in texts])


def _states(model: Model, examples: Sequence[Example], layer: int, batch_tokens: int, folder: Path) -> list[np.ndarray]:
    """States [tokens − opening, d] float16 of each example, without the opening that all rows share (`Marks.opening`).
    Every finished batch is saved in `folder`, and is read from it the next time.

    Raises UserError where they are not finite.
    """
    marks = marks_of(model.tokenizer)
    sizes = token_counts(examples)

    @fit_to_memory
    def read(batch: Sequence[Example]) -> Mapping[str, np.ndarray]:
        ids, *_ = pad(batch, model.device)
        openings = [opening_size(example.ids, marks) for example in batch]
        first = min(shared_opening(ids), *openings)  # computed once
        (states,) = hidden_at(model, ids, [layer], first)
        hidden = unit_length(states).cpu().half().numpy()
        rows = [hidden[n, start - first : len(e.ids) - first] for n, (e, start) in enumerate(zip(batch, openings))]
        return {"states": np.concatenate(rows)}

    def columns(batch: Sequence[Example]) -> Mapping[str, np.ndarray]:
        return read(batch).columns

    todo = {folder / f"{n}.safetensors": batch for n, batch in enumerate(batches(examples, batch_tokens))}
    done = [file for file in todo if file.exists()]
    before = [n for file in done for n in todo[file]]
    found: dict[int, np.ndarray] = {}
    title = "first use of this model: fitting the readouts"
    with progress(title, int(sizes.sum()), len(sizes), int(sizes[before].sum()), len(before)) as advance:
        for file, batch in todo.items():
            rows = [examples[n] for n in batch]
            states = kept_part(file, partial(columns, rows))["states"]
            ends = np.cumsum([len(e.ids) - opening_size(e.ids, marks) for e in rows])
            found.update(zip(batch, (each.copy() for each in np.split(states, ends[:-1]))))
            if file not in done:
                advance(int(sizes[batch].sum()), len(batch))
    if not all(np.isfinite(each).all() for each in found.values()):
        raise UserError(f"{model.name}: its states are not finite numbers; try --dtype float32 or bfloat16")
    return [found[n] for n in range(len(examples))]


def _spread(states: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(means, scales) [d] of the dimensions of the states.

    In (state − mean) / scale, all dimensions vary alike, and the vectors have a mean square length of 1. As they
    are, a few large dimensions use up what the regularisation allows.
    """
    sample = np.concatenate([each[::8] for each in states]).astype(np.float32)
    variance = sample.var(0, dtype=np.float64)
    variance += VARIANCE_FLOOR * variance.mean()  # a dimension that hardly varies holds rounding errors
    return sample.mean(0, dtype=np.float64), np.sqrt(variance * sample.shape[1])


def _topic_bags(rows: Sequence[_Row], states: Sequence[np.ndarray], fold: np.ndarray) -> Bags:
    """The context of each response, and each response that complies."""
    parts, labels, folds = [], [], []
    for row, held, own in zip(rows, states, fold):
        for piece, width in zip(_pieces(row, held), FIT_WINDOWS):
            if len(piece):
                parts.append(_running_means(piece, width, STRIDE))
                labels.append(row.text.harmful)
                folds.append(own)
    return _make_bags(parts, labels, folds)


def _answer_bags(rows: Sequence[_Row], states: Sequence[np.ndarray], fold: np.ndarray) -> Bags:
    """Windows of refusals and of responses that comply, each a bag of its own. Of harmless ones, only every second's
    first: with more, the openings of harmful ones count for too little."""
    parts, labels, folds = [], [], []
    good = 0
    for row, held, own in zip(rows, states, fold):
        kind = row.text.kind
        good += kind == "good" and not row.text.language
        if kind == "request" or (kind == "good" and (row.text.language or good % 2)):
            continue
        before = len(row.example.ids) - len(held)
        inside = held[row.response.start - before : row.response.stop - before]
        means = _running_means(inside, ANSWER_WINDOW, ANSWER_WINDOW // 2)
        start = row.response.start + np.arange(len(means)) * (ANSWER_WINDOW // 2)
        complies = np.full(len(means), kind != "refusal")
        informative = np.arange(len(means)) < (1 if kind == "good" else len(means))
        if row.text.turn:  # a token or two of what complies tell no more than the refusal does
            complies = start >= row.text.turn - 3
            informative = complies | (start + ANSWER_WINDOW <= row.text.turn)
        parts += list(means[informative][:, None])
        labels += complies[informative].tolist()
        folds += [own] * int(informative.sum())
    return _make_bags(parts, labels, folds)


def _running_means(states: np.ndarray, width: int, stride: int) -> np.ndarray:
    """Running means [n, d] float32 of states [tokens, d]: every `stride`-th."""
    width = min(width, len(states))
    total = np.concatenate([np.zeros_like(states[:1], dtype=np.float32), np.cumsum(states, 0, dtype=np.float32)])
    return ((total[width:] - total[:-width]) / width)[::stride]


def _make_bags(parts: Sequence[np.ndarray], labels: Sequence[bool], folds: Sequence[int]) -> Bags:
    of = torch.repeat_interleave(torch.arange(len(parts)), torch.tensor([len(p) for p in parts]))
    return Bags(torch.from_numpy(np.concatenate(parts)), of, torch.tensor(labels), torch.tensor(folds))


def _without_fold(bags: Bags, fold: int) -> Bags:
    """The bags of all folds but one."""
    kept = bags.fold != fold
    inside = kept[bags.of]
    number = torch.cumsum(kept, 0) - 1
    return Bags(bags.x[inside], number[bags.of[inside]], bags.label[kept], bags.fold[kept])


def _fits(bags: Bags, soft: bool, c: float) -> np.ndarray:
    """Weights and bias [folds, d + 1] of a fit on the bags of all other folds, for each fold."""
    return np.stack([_fit(_without_fold(bags, n), soft, c) for n in range(FOLDS)])


def _fit(bags: Bags, soft: bool, c: float) -> np.ndarray:
    """Weights and, last, the bias [d + 1] of a logistic regression on bags, both labels of equal weight.

    With `soft`, a bag's log-odds is the mean over its vectors, each weighted by the exponential of its own log-odds: it
    is near the highest of them.
    """
    x, of, count = bags.x, bags.of, len(bags.label)
    positive = bags.label.float()
    balance = torch.where(bags.label, count / (2 * positive.sum()), count / (2 * (count - positive.sum())))
    sign = 1 - 2 * positive
    parameters = torch.zeros(x.shape[1] + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([parameters], max_iter=80, history_size=20, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        each = x @ parameters[:-1] + parameters[-1]
        if soft:
            highest = torch.full((count,), -torch.inf).scatter_reduce(0, of, each.detach(), "amax")
            weight = torch.exp(each - highest[of])
            each = torch.zeros(count).index_add(0, of, weight * each) / torch.zeros(count).index_add(0, of, weight)
        errors = torch.nn.functional.softplus(sign * each)
        value = (c * (balance * errors).sum() + parameters[:-1].square().sum() / 2) / count
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[arg-type]
    return parameters.detach().double().numpy()


def _folds(words: Sequence[tuple[str, ...]]) -> np.ndarray:
    """A fold for each text; those that share words, directly or through others, have the same one."""
    place: dict[str, int] = {}
    edges = [(n, place.setdefault(word, len(place))) for n, each in enumerate(words) for word in each]
    text, word = np.array(edges).T
    size = len(words)
    graph = coo_matrix((np.ones(len(edges)), (text, size + word)), shape=(size + len(place),) * 2)
    group = connected_components(graph, directed=False)[1][:size]
    rank = np.argsort(np.argsort(-np.bincount(group), kind="stable"), kind="stable")  # the largest groups first
    return rank[group] % FOLDS
