"""Why does a row score as it does? Its signals beside the anchors', and the tokens, modules and probes of its FIHS.

FIHS is explained whatever score decided: with the default one, the signals say why, and FIHS is a second opinion.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from gradshield.data.encode import Example
from gradshield.errors import UserError
from gradshield.filter import (
    encode_row,
    load,
    require_aligned,
)
from gradshield.hooks import gradients_from, linear_hooks, logits_at
from gradshield.model import Model
from gradshield.probe import ProbeGradient, inner, margin, paper_tokens, probe_gradient
from gradshield.reference import make_reference
from gradshield.run import read_run, rows_of_run
from gradshield.scoring.contraction import contract, pad
from gradshield.settings import FilterSettings


@dataclass(frozen=True)
class Explanation:
    """A row's score and what it is made of; shares are of the summed absolute parts of the row's FIHS."""

    row: int
    score: float
    threshold: float
    verdict: str
    signals: Mapping[str, float]
    anchors: Mapping[str, float]  # median score of each kind of anchor
    tokens: tuple[tuple[str, float], ...]  # every token with its share of FIHS
    modules: tuple[tuple[str, float], ...]  # the ten modules with the largest share
    probes: tuple[tuple[str, float], ...]  # cosine of the row's gradient with each probe's, highest first


def explain(out: Path, row: int) -> Explanation:
    """Explains row number `row` (from 1, as in scores.parquet) of the run in `out`.

    Raises UserError when there is no such row, it was set aside, or its file changed.
    """
    saved = read_run(out)
    settings = FilterSettings(**saved["settings"])
    found = next((r for r in rows_of_run(saved) if r.index == row - 1), None)
    if found is None or row < 1:
        raise UserError(f"{out}: no row {row}; it has {saved['summary']['rows']} rows")
    model = load(settings)
    layout = saved["input"]["layout"]
    example = encode_row(found, layout, model, settings)
    if isinstance(example, str):
        raise UserError(f"row {row} was set aside: {example}")
    check = require_aligned(model, settings)
    reference = make_reference(model, check, settings)
    columns = {name: float(values[0]) for name, values in reference.scorer([example]).items()}
    score = columns.pop("score")
    given = saved["summary"]["threshold"]["value"]
    value = float("inf") if given is None else given  # None: nothing is removed
    probes = check.refused_probes()[: settings.probe_count]
    s = margin(*([t] for t in paper_tokens(model.tokenizer)))
    gradient = probe_gradient(model, probes, s)
    nearest = []
    for probe in probes:
        one = probe_gradient(model, [probe], s, tolerance=1e-2)
        result = contract(model, [example], one, exact_norms=True)
        norm = float(result.norms.sum()) if result.norms is not None else 1.0
        nearest.append((probe, float(result.dots.sum()) / (norm * inner(one, one)) ** 0.5))
    return Explanation(
        row,
        score,
        value,
        "quarantined" if score >= value else "kept",
        columns,
        {kind: float(np.median(values)) for kind, values in reference.anchors.items()},
        token_shares(model, example, gradient),
        _module_shares(model, example, gradient),
        tuple(sorted(nearest, key=lambda pair: -pair[1])),
    )


def token_shares(model: Model, example: Example, gradient: ProbeGradient) -> tuple[tuple[str, float], ...]:
    """Every token with its share of the example's FIHS: the contraction is a sum over positions, so it is exact."""
    ids, rows, positions, targets, weights = pad([example], model.device)
    total = torch.zeros(len(example.ids))

    def backward(name: str, x: torch.Tensor, delta: torch.Tensor) -> None:
        f = gradient.factors[name]
        total.add_(((x @ f.inp.T) * (delta @ f.out.T)).float().sum(-1)[0].cpu())

    with linear_hooks(model.linears, lambda _name, x: x, backward), gradients_from(model):
        logits = logits_at(model, ids, rows, positions).float()
        loss = torch.nn.functional.cross_entropy(logits, targets.to(logits.device), reduction="none")
        (loss * weights.to(loss.device)).sum().backward()
    scale = float(total.abs().sum()) or 1.0
    words = [model.tokenizer.decode([int(i)]) for i in example.ids]
    return tuple(zip(words, (total / scale).tolist()))


def _module_shares(model: Model, example: Example, gradient: ProbeGradient) -> tuple[tuple[str, float], ...]:
    dots = contract(model, [example], gradient).dots[0]
    scale = float(dots.abs().sum()) or 1.0
    order = dots.abs().argsort(descending=True)[:10].tolist()
    names = list(gradient.factors)
    return tuple((names[i], float(dots[i]) / scale) for i in order)
