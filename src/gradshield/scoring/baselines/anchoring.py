"""`anchoring`: rows close to harmful examples and far from safe ones, by gradient or by representation.

Source: He, Xia and Henderson, What is in Your Safe Data? Identifying Benign Data that Breaks Safety (2404.01099), and
their code.

    gradient:        score(z) = ⟨ĝ(z), m(harmful)⟩ − ⟨ĝ(z), m(safe 1)⟩ − ⟨ĝ(z), m(safe 2)⟩
    representation:  score(z) = mean of the `nearest` largest cosines of h(z) with the harmful examples

ĝ(z) = ∇ℓ/‖∇ℓ‖ on the first ten response tokens, m(D) the mean of ĝ over ten examples. State h is that of the row's last
token behind the final norm, as in their code (princeton-nlp/benign-data-breaks-safety, collect_info.py); `nearest` is
1. The cut to ten tokens is the paper's, and the code's for the loss: its states are those of the whole row. The
paper's harmful examples are ten of one kind (illegal activities), the safe ones the same requests answered safely in
two ways. Here all are bundled anchors: harmful openings, and two tens of refusals. The weights are the decoder's
Linears; ‖∇ℓ‖ of a row is exact. Only the gradient form anchors in both directions, as in the paper.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from gradshield.base.registry import NoOptions
from gradshield.data.encode import Example
from gradshield.scoring.base import Context, Prepared, ScoreFunction, Scorer
from gradshield.scoring.fihs.contraction import contract
from gradshield.scoring.fihs.descent import first_tokens, loss_gradient
from gradshield.scoring.fihs.probe import minus
from gradshield.scoring.states import cosine, read_states, states_at


class AnchoringOptions(NoOptions):
    """The paper's settings are the defaults."""

    by: Literal["gradient", "representation"] = Field(default="gradient", description="what is compared")
    examples: int = Field(default=10, ge=1, description="anchors of each set, for by=gradient")
    tokens: int = Field(default=10, ge=1, description="response tokens whose loss counts, for by=gradient")
    nearest: int = Field(default=1, ge=1, description="harmful examples whose cosines count, for by=representation")


def prepare(context: Context, options: AnchoringOptions) -> Prepared:
    """Takes the anchors' gradients or states."""
    form = _gradient if options.by == "gradient" else _representation
    return Prepared(form(context, options), fitted=True)


def _gradient(context: Context, options: AnchoringOptions) -> ScoreFunction:
    model, n = context.model, options.examples
    harmful, safe = context.fit_anchors["harmful"], context.fit_anchors["refusal"]
    sets = [[first_tokens(e, options.tokens) for e in part] for part in (harmful[:n], safe[:n], safe[n : 2 * n])]
    target, *others = (loss_gradient(model, part, unit=True) for part in sets)
    for other in others:
        target = minus(target, other)

    def score(batch: Sequence[Example]) -> Mapping[str, np.ndarray]:
        found = contract(model, [first_tokens(e, options.tokens) for e in batch], target, exact_norms=True)
        assert found.norms is not None
        norm = found.norms.double().sum(1).sqrt().clamp_min(1e-12)
        return {"score": (found.dots.double().sum(1) / norm).numpy()}

    return score


def _representation(context: Context, options: AnchoringOptions) -> ScoreFunction:
    model, layer = context.model, len(context.model.layers)  # behind the final norm
    harmful = context.fit_anchors["harmful"]
    [known] = context.cached(
        "states", lambda: {"s": read_states(model, harmful, [layer], "last", context.batch_tokens)}
    )["s"]

    def score(batch: Sequence[Example]) -> Mapping[str, np.ndarray]:
        near = np.sort(cosine(states_at(model, batch, [layer], "last")[0].numpy(), known), axis=1)
        return {"score": near[:, -options.nearest :].mean(1)}

    return score


SCORER = Scorer(
    "anchoring",
    "close to harmful examples, far from safe ones (2404.01099)",
    prepare,
    options=AnchoringOptions,
    needs=frozenset({"anchors"}),
    cost=3.5,
    version=2,
)
