"""Explains a row's score: its signals next to the anchors', and the tokens, modules and probes of its FIHS.

FIHS is a sum over probes, modules and tokens, so one backward pass gives all its parts, and each view sums over the
others. FIHS is explained for every scorer: with the default one, the signals explain the verdict, and FIHS is a second
opinion. S and the contrast are those of the run. The weights are always the Linears, whatever `weights` and `mapping`
are.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from gradshield.base.errors import UserError
from gradshield.base.settings import FilterSettings
from gradshield.data import Conversation, Row, to_conversation
from gradshield.data.encode import encode
from gradshield.data.run_folder import SavedRun, read_table, row_of_run
from gradshield.models.load import Model, load_settings_model
from gradshield.scoring.check import require_aligned
from gradshield.scoring.engine import fit_to_memory
from gradshield.scoring.fihs.fihs import fihs_options, harmless_part, safety_score
from gradshield.scoring.fihs.parts import fihs_parts, shares, words
from gradshield.scoring.fihs.probe import ProbeGradient, inner, probe_gradients
from gradshield.scoring.reference import Reference, make_reference
from gradshield.scoring.registry import find_scorer
from gradshield.screen.encoding import encode_row, known_good
from gradshield.screen.explanation import Explanation
from gradshield.threshold import is_kept

REFUSAL = "I'm sorry, but I can't help with that."
_MODULES = 10  # shown


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
    harmless: tuple[ProbeGradient, float] | None  # what `contrast` takes off each, and how many times


def open_explainer(saved: SavedRun) -> Explainer:
    """The explainer of the run with this run.yaml. Raises UserError when its model is missing or has changed."""
    try:
        settings = FilterSettings(**saved.settings)
    except ValidationError as error:
        name = error.errors()[0]["loc"][0]
        raise UserError(f"the run's setting {name!r} is from another version of GradShield; filter again") from None
    model = load_settings_model(settings)
    if model.fingerprint != saved.model.fingerprint:
        raise UserError(f"{model.name}: the model's files have changed since this run; filter again")
    check = require_aligned(model, settings)
    scorer, _ = find_scorer(settings.scorer)
    own_safe = known_good(model, settings, scorer.needs)
    reference = make_reference(model, check, settings, None, saved.summary.rows_digest, own_safe)
    options = fihs_options(settings.scorer)
    probes = tuple(check.refused_probes()[: options.probes])
    s = safety_score(model, check.refused_probes(), options)
    each = probe_gradients(model, probes, s)
    harmless = harmless_part(model, each, s, options)
    threshold = saved.summary.threshold.limit
    return Explainer(settings, saved.input.layout, threshold, model, reference, probes, tuple(each), harmless)


def explain(out: Path, row: int) -> Explanation:
    """Explains row number `row` (from 1, as in scores.parquet) of the run in `out`.

    Raises UserError when there is no such row, it was set aside, or its file changed.
    """
    saved, found = row_of_run(out, row)
    verdicts = read_table(out, ["verdict"])["verdict"]
    if len(verdicts) != saved.summary.rows:
        raise UserError(f"{out / 'scores.parquet'}: not the scores of this run ({len(verdicts)} rows); filter again")
    verdict = str(verdicts[row - 1])
    explained = explain_row(open_explainer(saved), found)
    if verdict == "set aside":
        raise UserError(f"row {row} was set aside: its score is not a finite number")
    moved = saved.review and saved.review.threshold  # by a person, who may also have decided about the row itself
    return replace(explained, verdict=verdict, threshold=moved.limit if moved and moved.who else explained.threshold)


def explain_row(explainer: Explainer, row: Row) -> Explanation:
    """The explanation of one row of the explainer's run. Raises UserError when it is one to set aside."""
    model, settings = explainer.model, explainer.settings
    example = encode_row(row, explainer.layout, model, settings, find_scorer(settings.scorer)[0].needs)
    if isinstance(example, str):
        raise UserError(f"row {row.index + 1} was set aside: {example}")
    scores = fit_to_memory(explainer.reference.scorer)([example])
    if scores.reasons:
        raise UserError(f"row {row.index + 1} was set aside: {scores.reasons[0]}")
    signals = {name: float(values[0]) for name, values in scores.columns.items()}
    score = signals.pop("score")
    taken, times = ([explainer.harmless[0]], explainer.harmless[1]) if explainer.harmless else ([], 0.0)
    parts, norm = fihs_parts(model, example, [*explainer.gradients, *taken])
    if taken:
        parts = parts[:-1] - times * parts[-1]
    squares = [
        inner(g, g) + sum(times**2 * inner(b, b) - 2 * times * inner(g, b) for b in taken) for g in explainer.gradients
    ]
    cosines = [float(part) / max(norm * square, 1e-30) ** 0.5 for part, square in zip(parts.sum((1, 2)), squares)]
    mean = parts.mean(0)  # [modules, tokens]: FIHS is by the mean over probes
    return Explanation(
        row=row.index + 1,
        score=score,
        threshold=explainer.threshold,
        verdict="kept" if is_kept(np.array(score), explainer.threshold) else "quarantined",
        by_fihs=find_scorer(settings.scorer)[0].name == "fihs",
        signals=signals,
        anchors={kind: float(np.median(values)) for kind, values in explainer.reference.anchors.items()},
        refusal=_refused(explainer, row),
        tokens=words(model.tokenizer, example, shares(mean.sum(0))),
        modules=_largest(list(explainer.gradients[0].factors), shares(mean.sum(1))),
        probes=tuple(sorted(zip(explainer.probes, cosines), key=lambda pair: -pair[1])),
    )


def _refused(explainer: Explainer, row: Row) -> float | None:
    """The row's score if a refusal stood in the place of every answer that is trained on."""
    conversation = to_conversation(
        row.record or {}, explainer.layout, explainer.settings.columns, explainer.settings.trainer
    )
    if not isinstance(conversation, Conversation) or not conversation.messages:
        return None
    turns = tuple(
        replace(turn, content=REFUSAL, extra=None, raw=None) if turn.role == "assistant" and turn.train else turn
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
    if isinstance(example, str):
        return None
    example = replace(example, conversation=replace(conversation, messages=turns))
    return float(fit_to_memory(explainer.reference.scorer)([example])["score"][0])


def _largest(names: Sequence[str], shares: Sequence[float]) -> tuple[tuple[str, float], ...]:
    return tuple(sorted(zip(names, shares), key=lambda pair: -abs(pair[1]))[:_MODULES])
