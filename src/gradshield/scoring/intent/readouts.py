"""The default score: does this row answer what the model would refuse?

Two readouts of the middle layers' hidden states, both linear, both fitted on the bundled anchors for the model at hand:
*request*, the log-odds that what stands in front of the response is a request to be refused, read at the request's own
last token and at the last one of the prompt, and *answer*, the log-odds that the response complies rather than refuses,
the highest over its windows (less one for all but the first); each is the mean over five layers. A row is harmful when
both hold, so its score is the smaller of the two; a row of several turns scores as its worst. It needs a forward pass
to the highest of the layers and nothing else (method 5c; docs/results).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from torch import Tensor

from gradshield.base.errors import UserError
from gradshield.base.progress import progress
from gradshield.data.encode import Example, closing_tokens, encode_prompt, end_of_request
from gradshield.models.batching import pad
from gradshield.models.hooks import hidden_at
from gradshield.models.load import Model
from gradshield.scoring.engine import batches, fitting
from gradshield.scoring.intent.windows import WINDOW, end_tokens, spoken, windows

DEPTHS = (0.5, 0.55, 0.6, 0.65, 0.7)  # of the blocks; where exactly matters little, their mean is steadier than any
LATER = 1.0  # how much surer a window behind the first must be: of many, one is high by chance (docs/log.md)
READING = 7  # goes up when a row's states or the folds change, so that what was fitted before is not used any more
SHARED = 8  # tokens that all rows must open with before it pays to compute them once
REGULARISATION = 30.0  # LogisticRegression's C, on states of unit length


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


@dataclass(frozen=True)
class Late:
    """A harmful anchor behind a refusal."""

    example: Example
    harmful: int  # index of the harmful anchor whose request and words it has
    refusal: int  # `row` of the refusal anchor whose words stand in front of them
    start: int  # position where the harmful anchor's own words begin


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
    rows = np.zeros((len(encoded), 2 * len(layers) * _width(model)))

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
    request, answer = intent.request.of(read.request), _highest(intent.answer.of(read.window), read.response)
    score = np.minimum(request, answer)
    order = np.lexsort((score, read.owner))  # the last of every owner is its highest
    worst = order[np.append(np.flatnonzero(np.diff(read.owner[order])), len(order) - 1)]
    return {"score": score[worst], "request": request[worst], "answer": answer[worst]}


def fit_intent(
    model: Model,
    anchors: Mapping[str, Sequence[Example]],
    late: Sequence[Late],
    to_refuse: Sequence[str],
    harmless: Sequence[str],
    batch_tokens: int,
) -> tuple[Intent, dict[str, np.ndarray]]:
    """The readouts fitted on anchors ("good", "refusal", "harmful") and requests, and the anchors' own scores.

    The scores of `late` are among the harmful ones. Refusals of the same `row` are longer and shorter forms of one. The
    scores are out of fold (five folds): no anchor is scored by a readout that has seen its words in any form.
    """
    layers = tuple(sorted({int(depth * len(model.layers)) for depth in DEPTHS}))
    closing = closing_tokens(model.tokenizer)
    flat = [*(e for examples in anchors.values() for e in examples), *(each.example for each in late)]
    kind = np.array([name for name, examples in anchors.items() for _ in examples] + ["late"] * len(late))
    request, window, start = _read(model, flat, layers, closing, batch_tokens)
    owner = np.repeat(np.arange(len(flat)), [len(w) for w in window])
    answer, start = np.concatenate(window), np.concatenate(start)
    if not (np.isfinite(request).all() and np.isfinite(answer).all()):
        raise UserError(f"{model.name}: its states are not finite numbers; try --dtype float32 or bfloat16")
    # What was refused need not be harmful, so refusals say nothing about requests; good rows say nothing about answers.
    told = (kind == "good") | (kind == "harmful")
    more = [request_states(model, requests, layers, closing) for requests in (to_refuse, harmless)]
    asked = np.concatenate([request[told], *more])
    bad = np.concatenate([kind[told] == "harmful", np.repeat([True, False], [len(m) for m in more])])
    request_fit, request_fold = _fit(asked, bad, np.arange(len(bad)), 2 * len(layers))
    same = np.arange(len(flat))  # whose request each has
    same[kind == "late"] = np.flatnonzero(kind == "harmful")[[each.harmful for each in late]] if late else []
    group = same.copy()  # what shares words is of one fold: a refusal's forms, late anchors behind it, and their harm
    group[kind == "refusal"] = [len(flat) + e.row for e in anchors["refusal"]]
    group[kind == "late"] = group[same[kind == "late"]] = [len(flat) + each.refusal for each in late]
    group = _joined(group, [e.ids[e.mask].tobytes() for e in flat])  # and responses to other requests in the same words
    harm = np.zeros(len(flat), dtype=int)  # where harm begins; a token or two of it tell no more than the refusal does
    harm[kind == "late"] = [each.start - 3 for each in late]
    complies = np.isin(kind[owner], ["harmful", "late"]) & (start >= harm[owner])
    refuses = (kind[owner] == "refusal") | ((kind[owner] == "late") & (start + WINDOW <= harm[owner] + 3))
    answered = complies | refuses
    answer_fit, answer_fold = _fit(answer[answered], complies[answered], group[owner[answered]], len(layers))
    request_score, answer_score = request_fit(request), answer_fit(answer)
    request_score[told], answer_score[answered] = request_fold[: told.sum()], answer_fold
    scores = np.minimum(request_score[same], _highest(answer_score, owner))
    kind[kind == "late"] = "harmful"
    return Intent(layers, closing, request_fit, answer_fit), {name: scores[kind == name] for name in anchors}


def _joined(group: np.ndarray, words: Sequence[bytes]) -> np.ndarray:
    """The groups [N], those with an example of the same words made one."""
    _, of = np.unique(group, return_inverse=True)
    place: dict[bytes, int] = {}
    said = np.array([place.setdefault(w, len(place)) for w in words])
    size = of.max() + 1
    edges = coo_matrix((np.ones(len(of)), (of, size + said)), shape=(size + len(place),) * 2)
    return connected_components(edges, directed=False)[1][of]


def _read(
    model: Model, examples: Sequence[Example], layers: Sequence[int], closing: Sequence[int], batch_tokens: int
) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
    """(request state, states of the windows, their starts) of each example's last response."""
    request = np.zeros((len(examples), 2 * len(layers) * _width(model)))
    window, start = np.empty(len(examples), dtype=object), np.empty(len(examples), dtype=object)

    @fitting
    def read(batch: Sequence[Example]) -> dict[str, np.ndarray]:
        found = states(model, batch, layers, closing)
        last = np.append(np.flatnonzero(np.diff(found.owner)), len(found.owner) - 1)
        windows, starts = np.empty(len(batch), dtype=object), np.empty(len(batch), dtype=object)
        for n, response in enumerate(last):
            mine = np.flatnonzero(found.response == response)
            windows[n], starts[n] = found.window[mine].cpu().numpy(), found.start[mine]  # float32: there are many
        return {"request": found.request[last].cpu().numpy(), "window": windows, "start": starts}

    with progress("anchors", 0, len(examples)) as advance:
        for batch in batches(seen(model, examples), batch_tokens):
            found = read([examples[n] for n in batch])
            request[batch], window[batch], start[batch] = found["request"], found["window"], found["start"]
            advance(0, len(batch))
    return request, list(window), list(start)


def _highest(values: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """The highest value of each owner's windows, those behind its first less LATER; `owner` counts up from 0."""
    first = np.diff(owner, prepend=-1) > 0
    return np.maximum.reduceat(np.where(first, values, values - LATER), np.flatnonzero(first))


def _fit(x: np.ndarray, y: np.ndarray, group: np.ndarray, states: int) -> tuple[Readout, np.ndarray]:
    """The mean of one logistic regression a state, and its log-odds [N] for x [N, states * d], out of fold; what is of
    one group is in one fold."""
    folds = list(StratifiedGroupKFold(5, shuffle=True, random_state=0).split(x, y, group))
    weights, bias, out_of_fold = [], 0.0, np.zeros(len(x))
    for part in np.split(x, states, axis=1):
        part = np.ascontiguousarray(part, dtype=np.float64)
        # One optimum, two ways to it: Newton's is quick as long as the states are narrow.
        solver = "newton-cholesky" if part.shape[1] < min(len(part), 1024) else "lbfgs"
        model = LogisticRegression(C=REGULARISATION, class_weight="balanced", max_iter=5000, solver=solver)
        out_of_fold += np.asarray(cross_val_predict(model, part, y, cv=folds, method="decision_function")) / states
        model.fit(part, y)
        weights.append(model.coef_[0].astype(np.float64) / states)
        bias += float(np.ravel(model.intercept_)[0]) / states
    return Readout(np.concatenate(weights), bias), out_of_fold


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


def _width(model: Model) -> int:
    """d, also of a model whose config has one part for text and another for images."""
    return model.net.config.get_text_config().hidden_size
