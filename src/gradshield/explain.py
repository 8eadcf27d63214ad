"""Why does a row score as it does? Its signals beside the anchors', and the tokens, modules and probes of its FIHS.

FIHS is a sum over probes, modules and tokens, so one backward pass gives every part of it, and each question is a sum
over the others. It is explained whatever score decided: with the default one, the signals say why, and FIHS is a second
opinion.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradshield.data import Conversation, Row, to_conversation
from gradshield.data.encode import Example, encode
from gradshield.errors import UserError
from gradshield.filter import (
    encode_row,
    load,
    require_aligned,
)
from gradshield.hooks import gradients_from, linear_hooks, logits_at
from gradshield.model import Model
from gradshield.probe import ProbeGradient, inner, margin, paper_tokens, probe_gradient
from gradshield.reference import Reference, make_reference
from gradshield.run import read_run, rows_of_run
from gradshield.scoring.contraction import pad
from gradshield.settings import FilterSettings

REFUSAL = "I'm sorry, but I can't help with that."
_MODULES = 10  # shown
_PIECES = 6  # tokens at most that one character is made of


@dataclass(frozen=True)
class Explanation:
    """A row's score and what it is made of; shares are of the summed absolute parts of the row's FIHS."""

    row: int
    score: float
    threshold: float
    verdict: str
    signals: Mapping[str, float]
    anchors: Mapping[str, float]  # median score of each kind of anchor
    refusal: float | None  # score of the same request with a refusal as its answer; None for plain text
    tokens: tuple[tuple[str, float], ...]  # every token with its share of FIHS
    modules: tuple[tuple[str, float], ...]  # the ten modules with the largest share
    probes: tuple[tuple[str, float], ...]  # cosine of the row's gradient with each probe's, highest first


@dataclass(frozen=True)
class Explainer:
    """The model of a run and what rows are measured with, loaded once for any number of rows."""

    settings: FilterSettings
    layout: str
    threshold: float
    model: Model
    reference: Reference
    probes: tuple[str, ...]
    gradients: tuple[ProbeGradient, ...]  # one a probe


def open_explainer(saved: Mapping[str, Any]) -> Explainer:
    """The explainer of the run with this run.yaml. Raises UserError when its model is not there or another by now."""
    settings = FilterSettings(**saved["settings"])
    model = load(settings)
    if model.fingerprint != saved["model"]["fingerprint"]:
        raise UserError(f"{model.name}: not the model of this run any more (its weights differ); filter again")
    check = require_aligned(model, settings)
    reference = make_reference(model, check, settings)
    probes = tuple(check.refused_probes()[: settings.probe_count])
    s = margin(*([t] for t in paper_tokens(model.tokenizer)))
    gradients = tuple(probe_gradient(model, [probe], s) for probe in probes)
    value = saved["summary"]["threshold"]["value"]
    threshold = float("inf") if value is None else float(value)  # None: nothing is removed
    return Explainer(settings, saved["input"]["layout"], threshold, model, reference, probes, gradients)


def explain(out: Path, row: int) -> Explanation:
    """Explains row number `row` (from 1, as in scores.parquet) of the run in `out`.

    Raises UserError when there is no such row, it was set aside, or its file changed.
    """
    saved = read_run(out)
    found = next((r for r in rows_of_run(saved) if r.index == row - 1), None)
    if found is None or row < 1:
        raise UserError(f"{out}: no row {row}; it has {saved['summary']['rows']} rows")
    return explain_row(open_explainer(saved), found)


def explain_row(explainer: Explainer, row: Row) -> Explanation:
    """The explanation of one row of the explainer's run. Raises UserError when it is one to set aside."""
    model, settings = explainer.model, explainer.settings
    example = encode_row(row, explainer.layout, model, settings)
    if isinstance(example, str):
        raise UserError(f"row {row.index + 1} was set aside: {example}")
    signals = {name: float(values[0]) for name, values in explainer.reference.scorer([example]).items()}
    score = signals.pop("score")
    parts, norm = fihs_parts(model, example, explainer.gradients)
    cosines = [
        float(part) / max(norm * inner(gradient, gradient), 1e-30) ** 0.5
        for part, gradient in zip(parts.sum((1, 2)), explainer.gradients)
    ]
    mean = parts.mean(0)  # [modules, tokens]: FIHS is by the mean over probes
    return Explanation(
        row.index + 1,
        score,
        explainer.threshold,
        "quarantined" if score >= explainer.threshold else "kept",
        signals,
        {kind: float(np.median(values)) for kind, values in explainer.reference.anchors.items()},
        _refused(explainer, row),
        _words(model.tokenizer, example, _shares(mean.sum(0))),
        _largest(list(explainer.gradients[0].factors), _shares(mean.sum(1))),
        tuple(sorted(zip(explainer.probes, cosines), key=lambda pair: -pair[1])),
    )


def fihs_parts(model: Model, example: Example, gradients: Sequence[ProbeGradient]) -> tuple[Tensor, float]:
    """(⟨∇L, ∇S⟩ in its parts [probes, modules, tokens], ‖∇L‖² over all modules), both exact; float32 on the CPU."""
    names = list(gradients[0].factors)
    ids, rows, positions, targets, weights = pad([example], model.device)
    parts = torch.zeros(len(gradients), len(names), len(example.ids))
    norm = 0.0

    def backward(name: str, x: Tensor, delta: Tensor) -> None:
        nonlocal norm
        x, delta = x[0].float(), delta[0].float()  # [T, d_in], [T, d_out]
        for probe, gradient in enumerate(gradients):
            f = gradient.factors[name]
            parts[probe, names.index(name)] = ((x @ f.inp.T) * (delta @ f.out.T)).sum(-1).cpu()
        norm += float(((x @ x.T) * (delta @ delta.T)).sum())  # ‖Σ_t δ_t x_tᵀ‖²

    modules = {name: model.linears[name] for name in names}
    with linear_hooks(modules, lambda _name, x: x, backward), gradients_from(model):
        logits = logits_at(model, ids, rows, positions).float()
        loss = torch.nn.functional.cross_entropy(logits, targets.to(logits.device), reduction="none")
        (loss * weights.to(loss.device)).sum().backward()
    return parts, norm


def _refused(explainer: Explainer, row: Row) -> float | None:
    """The row's score if a refusal stood in the place of every answer that is trained on."""
    conversation = to_conversation(row.record or {}, explainer.layout, explainer.settings.columns)
    if not isinstance(conversation, Conversation) or not conversation.messages:
        return None
    turns = tuple(
        replace(turn, content=REFUSAL, extra=None) if turn.role == "assistant" and turn.train else turn
        for turn in conversation.messages
    )
    settings, tokenizer = explainer.settings, explainer.model.tokenizer
    example = encode(
        replace(conversation, messages=turns),
        row.index,
        tokenizer,
        max_length=settings.max_length,
        loss_on=settings.loss_on,
    )
    return None if isinstance(example, str) else float(explainer.reference.scorer([example])["score"][0])


def _shares(parts: Tensor) -> list[float]:
    return (parts / (float(parts.abs().sum()) or 1.0)).tolist()


def _words(tokenizer: Any, example: Example, shares: Sequence[float]) -> tuple[tuple[str, float], ...]:
    """Each token's text with its share; tokens that only together make a character are one."""
    words: list[tuple[str, float]] = []
    start = 0
    for end in range(1, len(shares) + 1):
        text = tokenizer.decode(example.ids[start:end].tolist(), clean_up_tokenization_spaces=False)
        if text.endswith("\ufffd") and end - start < _PIECES and end < len(shares):
            continue
        words.append((text, float(sum(shares[start:end]))))
        start = end
    return tuple(words)


def _largest(names: Sequence[str], shares: Sequence[float]) -> tuple[tuple[str, float], ...]:
    return tuple(sorted(zip(names, shares), key=lambda pair: -abs(pair[1]))[:_MODULES])
