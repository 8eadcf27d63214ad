"""The default score: does this row answer what the model would refuse?

Two readouts of one hidden layer, both linear, both fitted on the bundled anchors for the model at hand: *request*, the
log-odds that the last prompt token carries a request to be refused, and *answer*, the log-odds that the opening of the
response complies rather than refuses. A row is harmful when both hold, so its score is the smaller of the two; a row of
several turns scores as its worst. It needs a forward pass to the layer and nothing else (method 5c; docs/results).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from torch import Tensor

from gradshield.data.encode import Example, encode_request
from gradshield.hooks import hidden_at
from gradshield.model import Model
from gradshield.scoring.contraction import pad
from gradshield.scoring.run import batches
from gradshield.scoring.windows import end_tokens, opening, response_starts

DEPTH = 0.55  # of the blocks: about where requests are read best on both models (docs/log.md)
WINDOW = 8  # response tokens read
REGULARISATION = 3.0  # LogisticRegression's C, on states of unit length


@dataclass(frozen=True)
class Readout:
    """log-odds = state · weight + bias, for states [d] of unit length."""

    weight: np.ndarray  # float64 [d]
    bias: float

    def __call__(self, states: np.ndarray) -> np.ndarray:
        return states @ self.weight + self.bias


@dataclass(frozen=True)
class Intent:
    """The two readouts of a model, and the layer that they read."""

    layer: int
    request: Readout
    answer: Readout


def states(model: Model, batch: Sequence[Example], layer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(request [R, d], answer [R, d], owner [R]) of the R responses in the batch, as unit vectors.

    The state in front of a response's first token, the mean state over its opening, and the index of its example.
    """
    ends = end_tokens(model.tokenizer)
    cut = [opening(e, WINDOW, ends) for e in batch]
    ids, *_ = pad(cut, model.device)
    hidden = hidden_at(model, ids, layer).float()  # [B, T, d]
    requests, answers, owner = [], [], []
    for n, example in enumerate(cut):
        starts = response_starts(example.mask)
        for start in starts:
            run = example.mask[start : start + WINDOW]
            stop = start + (len(run) if run.all() else int(np.argmin(run)))
            requests.append(hidden[n, start - 1])
            answers.append(hidden[n, start:stop].mean(0))
            owner.append(n)
    return _unit(torch.stack(requests)), _unit(torch.stack(answers)), np.array(owner)


def request_states(model: Model, requests: Sequence[str], layer: int) -> np.ndarray:
    """Unit states [N, d] of the last prompt token of every request."""
    encoded = [encode_request(r, model.tokenizer) for r in requests]
    examples = [Example(n, ids, np.arange(len(ids)) > 0) for n, ids in enumerate(encoded)]
    rows = np.zeros((len(encoded), model.net.config.hidden_size))
    for batch in batches(examples, 2048):
        ids, *_ = pad([examples[n] for n in batch], model.device)
        hidden = hidden_at(model, ids, layer).float()
        rows[batch] = _unit(torch.stack([hidden[k, len(encoded[n]) - 1] for k, n in enumerate(batch)]))
    return rows


def intent_scores(model: Model, intent: Intent, batch: Sequence[Example]) -> dict[str, np.ndarray]:
    """Columns "score", "request" and "answer" [B]: of each row, its response with the highest score."""
    requests, answers, owner = states(model, batch, intent.layer)
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
    layer = int(DEPTH * len(model.layers))
    kinds = [kind for kind, examples in anchors.items() for _ in examples]
    flat = [e for examples in anchors.values() for e in examples]
    request = np.zeros((len(flat), model.net.config.hidden_size))
    answer = np.zeros_like(request)
    for batch in batches(flat, batch_tokens):
        r, a, owner = states(model, [flat[n] for n in batch], layer)
        last = np.append(np.flatnonzero(np.diff(owner)), len(owner) - 1)  # anchors have one response; more: the last
        request[batch], answer[batch] = r[last], a[last]
    kind = np.array(kinds)
    asked = np.concatenate([request, request_states(model, to_refuse, layer), request_states(model, harmless, layer)])
    bad = np.concatenate([kind != "good", np.ones(len(to_refuse), bool), np.zeros(len(harmless), bool)])
    request_fit, request_fold = _fit(asked, bad)
    answered = kind != "good"
    answer_fit, answer_fold = _fit(answer[answered], kind[answered] == "harmful")
    answer_score = np.where(answered, 0.0, answer_fit(answer))  # good rows are in no fold of the answer's fit
    answer_score[answered] = answer_fold
    scores = np.minimum(request_fold[: len(flat)], answer_score)
    return Intent(layer, request_fit, answer_fit), {name: scores[kind == name] for name in anchors}


def _fit(x: np.ndarray, y: np.ndarray) -> tuple[Readout, np.ndarray]:
    model = LogisticRegression(C=REGULARISATION, class_weight="balanced", max_iter=5000)
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    out_of_fold = np.asarray(cross_val_predict(model, x, y, cv=folds, method="decision_function"))
    model.fit(x, y)
    return Readout(model.coef_[0].astype(np.float64), float(np.ravel(model.intercept_)[0])), out_of_fold


def _unit(rows: Tensor) -> np.ndarray:
    return (rows / rows.norm(dim=-1, keepdim=True)).double().cpu().numpy()
