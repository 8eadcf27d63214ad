"""Fits the two readouts of `intent` on the bundled anchors and requests, out of fold where anchors are scored."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict

from gradshield.base.errors import UserError
from gradshield.base.progress import progress
from gradshield.data.encode import Example, closing_tokens
from gradshield.models.load import Model
from gradshield.scoring.engine import batches, fitting
from gradshield.scoring.intent.readouts import (
    DEPTHS,
    Intent,
    Readout,
    highest,
    request_states,
    seen,
    states,
    width_of,
)
from gradshield.scoring.intent.windows import WINDOW

REGULARISATION = 30.0  # LogisticRegression's C, on states of unit length


@dataclass(frozen=True)
class Late:
    """A harmful anchor behind a refusal."""

    example: Example
    harmful: int  # index of the harmful anchor whose request and words it has
    refusal: int  # `row` of the refusal anchor whose words stand in front of them
    start: int  # position where the harmful anchor's own words begin


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
    scores = np.minimum(request_score[same], highest(answer_score, owner))
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
    request = np.zeros((len(examples), 2 * len(layers) * width_of(model)))
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
