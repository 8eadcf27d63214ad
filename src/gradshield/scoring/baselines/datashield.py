"""`datashield`: how far the answer shifts along the direction from refusing to complying.

Source: Zhang et al., DataShield: Safety-degrading Data Filtering for LLM Benign Instruction Fine-Tuning (2606.00160),
and their code.

    v = (mean of r over compliant rows − mean of r over refusing rows), of unit length
    score(z) = ⟨r(z) − p(z), v⟩

r is the mean state of the answer's tokens, p the state of the last prompt token. The layer is the one of the highest
Compliance-Aware Score, vᵀ S_b v / vᵀ S_t v: the between-class share of the scatter of r along v, over states of unit
variance. The compliant rows are bundled harmful anchors, which the paper answers in full and we only open; the refusing
ones are bundled refusals. The CAS is taken on the same rows.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from pydantic import Field

from gradshield.base.registry import NoOptions
from gradshield.data.encode import Example
from gradshield.scoring.base import Context, Prepared, Scorer
from gradshield.scoring.states import layer_of, read_states, states_at

EXAMPLES = 100  # of each kind


class DataShieldOptions(NoOptions):
    """Where states are read."""

    layer: int | None = Field(
        default=None, ge=0, description="decoder block that is read (default: of the highest CAS)"
    )


def prepare(context: Context, options: DataShieldOptions) -> Prepared:
    """Takes the compliance direction of every layer, and the layer where it tells the two kinds apart best."""
    model, anchors = context.model, context.fit_anchors

    def fit() -> dict[str, np.ndarray]:
        layers = range(len(model.layers)) if options.layer is None else [layer_of(model, options.layer)]
        comply, refuse = (
            read_states(model, anchors[kind][:EXAMPLES], layers, "response", context.batch_tokens)
            for kind in ("harmful", "refusal")
        )
        found = [compliance(c, r) for c, r in zip(comply, refuse)]
        best = int(np.argmax([score for _, score in found]))
        return {"layer": np.array(layers[best]), "direction": found[best][0]}

    fitted = context.cached("direction", fit)
    layer = int(fitted["layer"].item())

    def score(batch: Sequence[Example]) -> Mapping[str, np.ndarray]:
        answer, prompt = (
            states_at(model, batch, [layer], "response")[0].double().numpy() @ fitted["direction"],
            states_at(model, batch, [layer], "prompt")[0].double().numpy() @ fitted["direction"],
        )
        return {"score": answer - prompt, "answer": answer, "prompt": prompt}

    return Prepared(score, fitted=True)


def compliance(comply: np.ndarray, refuse: np.ndarray) -> tuple[np.ndarray, float]:
    """(the unit direction [d] from refusing to complying states, its Compliance-Aware Score in [0, 1])."""
    comply, refuse = comply.astype(np.float64), refuse.astype(np.float64)
    direction = comply.mean(0) - refuse.mean(0)
    direction /= max(float(np.linalg.norm(direction)), 1e-12)
    both = np.concatenate([comply, refuse])
    at = ((both - both.mean(0)) / np.maximum(both.std(0), 1e-12)) @ direction
    one, other = at[: len(comply)], at[len(comply) :]
    between = len(one) * one.mean() ** 2 + len(other) * other.mean() ** 2
    return direction, float(between / max(float((at**2).sum()), 1e-12))


SCORER = Scorer(
    "datashield",
    "shift of the answer along the compliance direction (2606.00160)",
    prepare,
    options=DataShieldOptions,
    needs=frozenset({"anchors"}),
    cost=2.0,
    columns=("answer", "prompt"),
)
