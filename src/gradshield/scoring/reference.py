"""The reference for rows: a scorer prepared for the model, and its scores of the anchors."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gradshield.base.errors import UserError
from gradshield.base.settings import FilterSettings
from gradshield.data.encode import Example
from gradshield.models.load import Model
from gradshield.scoring.anchors import ANCHOR_FILES
from gradshield.scoring.base import Context, Prepared, ScoreFunction
from gradshield.scoring.check import AlignmentCheck
from gradshield.scoring.engine import example_digest, score
from gradshield.scoring.registry import find_scorer


@dataclass(frozen=True)
class Reference:
    """A scorer ready for rows."""

    scorer: ScoreFunction
    anchors: Mapping[str, np.ndarray]  # scores by kind: "good", "refusal", "harmful"; empty where none are needed
    scored_part: Callable[[Sequence[Example]], list[Example]] = list  # the part of examples that the scorer reads
    files: frozenset[Path] = frozenset()  # the cache files that a worker needs


def make_reference(
    model: Model,
    check: AlignmentCheck,
    settings: FilterSettings,
    rows: Sequence[Example] | None = None,
    rows_key: str = "",
    own_safe: Sequence[Example] = (),
) -> Reference:
    """Prepares the scorer that the settings name; its anchors are scored where the threshold needs them.

    Raises UserError when the model refuses no probe, or for options that exclude each other.
    """
    usable = check.refused_probes()
    if not usable:
        raise UserError(
            f"{model.name} refuses none of the {len(check.probes)} probes, so it can't score rows; use an aligned model"
        )
    scorer, options = find_scorer(settings.scorer)
    context = Context(
        scorer=scorer,
        options=options,
        model=model,
        probes=tuple(usable),
        loss_on=settings.loss_on,
        max_length=settings.max_length,
        batch_tokens=model.batch_tokens,
        rows=rows,
        rows_key=rows_key or (key_of(rows or ()) if "whole file" in scorer.needs else ""),
        own_safe=own_safe,
        own_safe_key=key_of(own_safe),
    )
    prepared = scorer.prepare(context, options)
    anchors = prepared.anchors
    if anchors is None:
        anchors = _anchor_scores(context, prepared) if settings.threshold == "anchored" else {}
    anchors = {kind: anchors[kind] for kind in ANCHOR_FILES if kind in anchors}  # the cache has them by name
    return Reference(prepared.score, anchors, prepared.read, frozenset(context.used))


def key_of(rows: Sequence[Example]) -> str:
    """Digest of the rows, in their order."""
    return hashlib.sha256(b"".join(example_digest(e) for e in rows)).hexdigest()[:16] if rows else ""


def _anchor_scores(context: Context, prepared: Prepared) -> Mapping[str, np.ndarray]:
    for kind in ANCHOR_FILES:
        if not context.anchors[kind]:
            raise UserError(
                f"no {kind} anchor can be encoded for this model: raise --max-length, or use --threshold a1"
            )

    def make() -> dict[str, np.ndarray]:
        found = {}
        for kind, examples in context.anchors.items():
            rows = prepared.read(examples[1::2] if prepared.fitted else examples)
            scores = score(rows, prepared.score, batch_tokens=context.batch_tokens, title=f"{kind} anchors")
            if len(scores.reasons) == len(rows):
                why = next(iter(scores.reasons.values()))
                raise UserError(
                    f"--scorer {context.scorer.name}: no {kind} anchor has a score ({why}): use --threshold share or a1"
                )
            found[kind] = np.delete(scores["score"], list(scores.reasons))
        return found

    return context.cached("anchors", make)
