"""The default score: does this row answer what the model would refuse?

Two readouts of the middle layers' hidden states, both linear, both fitted on the bundled anchors for the model at hand:
*request*, the log-odds that the last prompt token carries a request to be refused, and *answer*, the log-odds that the
opening of the response complies rather than refuses; each is the mean over five layers. A row is harmful when both
hold, so its score is the smaller of the two; a row of several turns scores as its worst. It needs a forward pass to the
highest of the layers and nothing else (method 5c; docs/results).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from torch import Tensor

from gradshield.data.encode import Example, encode_request
from gradshield.errors import UserError
from gradshield.hooks import hidden_at
from gradshield.model import Model
from gradshield.scoring.contraction import pad
from gradshield.scoring.run import batches
from gradshield.scoring.windows import end_tokens, opening, response_starts

DEPTHS = (0.5, 0.55, 0.6, 0.65, 0.7)  # of the blocks; where exactly matters little, their mean is steadier than any
WINDOW = 8  # response tokens read
READING = 2  # goes up when states of the same row change, so that readouts fitted before are not used any more
SHARED = 8  # tokens that all rows must open with before it pays to compute them once
REGULARISATION = 30.0  # LogisticRegression's C, on states of unit length


@dataclass(frozen=True)
class Readout:
    """log-odds = states · weight + bias, for the layers' states side by side [layers * d], each of unit length."""

    weight: np.ndarray  # float64 [layers * d]
    bias: float

    def __call__(self, states: np.ndarray) -> np.ndarray:
        return states @ self.weight + self.bias


@dataclass(frozen=True)
class Intent:
    """The two readouts of a model, and the layers that they read."""

    layers: tuple[int, ...]
    request: Readout
    answer: Readout


def seen(model: Model, examples: Sequence[Example]) -> list[Example]:
    """What the score reads of the examples: up to the last response's opening, with the mask on the openings."""
    ends = end_tokens(model.tokenizer)
    return [opening(e, WINDOW, ends) for e in examples]


def states(model: Model, batch: Sequence[Example], layers: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(request [R, layers * d], answer [R, layers * d], owner [R]) of the R responses in the batch.

    The state in front of a response's first token, the mean state over its opening, both as a unit vector of each
    layer, and the index of its example.
    """
    cut = seen(model, batch)
    ids, *_ = pad(cut, model.device)
    hidden, first = _side_by_side(model, ids, layers, [int(np.argmax(e.mask)) - 1 for e in cut])
    requests, answers, owner = [], [], []
    for n, example in enumerate(cut):
        for start in response_starts(example.mask):
            stop = start + int(np.argmin(np.append(example.mask[start:], False)))
            requests.append(hidden[n, start - 1 - first])
            answers.append(hidden[n, start - first : stop - first].mean(0))
            owner.append(n)
    return _unit(torch.stack(requests)), _unit(torch.stack(answers)), np.array(owner)


def request_states(model: Model, requests: Sequence[str], layers: Sequence[int]) -> np.ndarray:
    """States [N, layers * d] of the last prompt token of every request, a unit vector of each layer."""
    encoded = [encode_request(r, model.tokenizer) for r in requests]
    examples = [Example(n, ids, np.arange(len(ids)) > 0) for n, ids in enumerate(encoded)]
    rows = np.zeros((len(encoded), len(layers) * _width(model)))
    for batch in batches(examples, 2048):
        ids, *_ = pad([examples[n] for n in batch], model.device)
        last = [len(encoded[n]) - 1 for n in batch]
        hidden, first = _side_by_side(model, ids, layers, last)
        rows[batch] = _unit(torch.stack([hidden[k, place - first] for k, place in enumerate(last)]))
    return rows


def intent_scores(model: Model, intent: Intent, batch: Sequence[Example]) -> dict[str, np.ndarray]:
    """Columns "score", "request" and "answer" [B]: of each row, its response with the highest score."""
    requests, answers, owner = states(model, batch, intent.layers)
    request, answer = intent.request(requests), intent.answer(answers)
    score = np.minimum(request, answer)
    order = np.lexsort((score, owner))  # the last of every owner is its highest
    worst = order[np.append(np.flatnonzero(np.diff(owner[order])), len(order) - 1)]
    return {"score": score[worst], "request": request[worst], "answer": answer[worst]}


def fit_intent(
    model: Model,
    anchors: Mapping[str, Sequence[Example]],
    to_refuse: Sequence[str],
    harmless: Sequence[str],
    batch_tokens: int,
) -> tuple[Intent, dict[str, np.ndarray]]:
    """The readouts fitted on anchors ("good", "refusal", "harmful") and requests, and the anchors' own scores.

    The scores are out of fold (five folds): no anchor is scored by a readout that has seen it.
    """
    layers = tuple(sorted({int(depth * len(model.layers)) for depth in DEPTHS}))
    flat = [e for examples in anchors.values() for e in examples]
    kind = np.array([name for name, examples in anchors.items() for _ in examples])
    request = np.zeros((len(flat), len(layers) * _width(model)))
    answer = np.zeros_like(request)
    for batch in batches(seen(model, flat), batch_tokens):
        r, a, owner = states(model, [flat[n] for n in batch], layers)
        last = np.append(np.flatnonzero(np.diff(owner)), len(owner) - 1)  # anchors have one response; more: the last
        request[batch], answer[batch] = r[last], a[last]
    if not (np.isfinite(request).all() and np.isfinite(answer).all()):
        raise UserError(f"{model.name}: its states are not finite numbers; try --dtype float32 or bfloat16")
    # What was refused need not be harmful, so refusals say nothing about requests; good rows say nothing about answers.
    told, answered = kind != "refusal", kind != "good"
    more = [request_states(model, requests, layers) for requests in (to_refuse, harmless)]
    asked = np.concatenate([request[told], *more])
    bad = np.concatenate([kind[told] == "harmful", np.repeat([True, False], [len(m) for m in more])])
    request_fit, request_fold = _fit(asked, bad, len(layers))
    answer_fit, answer_fold = _fit(answer[answered], kind[answered] == "harmful", len(layers))
    request_score, answer_score = request_fit(request), answer_fit(answer)
    request_score[told], answer_score[answered] = request_fold[: told.sum()], answer_fold
    scores = np.minimum(request_score, answer_score)
    return Intent(layers, request_fit, answer_fit), {name: scores[kind == name] for name in anchors}


def _fit(x: np.ndarray, y: np.ndarray, layers: int) -> tuple[Readout, np.ndarray]:
    """The mean of one logistic regression a layer, and its log-odds [N] for x [N, layers * d], out of fold."""
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    weights, bias, out_of_fold = [], 0.0, np.zeros(len(x))
    for part in (np.ascontiguousarray(part) for part in np.split(x, layers, axis=1)):
        # One optimum, two ways to it: Newton's is quick as long as the states are no wider than the anchors are many.
        solver = "newton-cholesky" if part.shape[1] < len(part) else "lbfgs"
        model = LogisticRegression(C=REGULARISATION, class_weight="balanced", max_iter=5000, solver=solver)
        out_of_fold += np.asarray(cross_val_predict(model, part, y, cv=folds, method="decision_function")) / layers
        model.fit(part, y)
        weights.append(model.coef_[0].astype(np.float64) / layers)
        bias += float(np.ravel(model.intercept_)[0]) / layers
    return Readout(np.concatenate(weights), bias), out_of_fold


def _side_by_side(model: Model, ids: Tensor, layers: Sequence[int], wanted: Sequence[int]) -> tuple[Tensor, int]:
    """(states [B, T − first, layers, d] from position `first` on, `first`), for rows whose first position that is
    wanted is `wanted` [B]. What all rows open with, such as a system prompt, is computed once for all of them."""
    same = (ids == ids[0]).all(0)
    shared = min(int(torch.argmin(torch.cat([same, same.new_zeros(1)]).int())), min(wanted))
    first = shared if len(ids) > 1 and shared >= SHARED else 0
    found = hidden_at(model, ids, layers, first)
    return torch.stack([h.float().to(model.device) for h in found], 2), first


def _width(model: Model) -> int:
    """d, also of a model whose config has one part for text and another for images."""
    return model.net.config.get_text_config().hidden_size


def _unit(rows: Tensor) -> np.ndarray:
    """[N, layers, d] → [N, layers * d], every layer's part of unit length."""
    return (rows / rows.norm(dim=-1, keepdim=True)).flatten(1).double().cpu().numpy()
