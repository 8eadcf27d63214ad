"""`datashield`: how far the answer shifts along the direction from refusing to complying.

Source: Zhang et al., DataShield: Safety-degrading Data Filtering for LLM Benign Instruction Fine-Tuning (2606.00160),
and their code.

    v = (mean of r over compliant rows − mean of r over refusing rows), of unit length
    score(z) = ⟨r(z) − p(z), v⟩

r is the mean state of the answer's tokens, p the state of the last prompt token. The end of the turn, and white space
in front of it, are no part of the answer. The layer is the one of the highest Compliance-Aware Score (CAS),
uᵀ S_b u / uᵀ S_t u: the between-class share of the scatter along u, over states of unit variance. As in their code
(ZJunBo/DataShield, get_vec.py and get_score.py), the CAS reads the state of a row's last token, and u is the direction
between the kinds in these states.

The authors answer each harmful request in both ways, for v and for u. Here the compliant rows are bundled harmful
anchors, which are only opened. The refusing ones are bundled refusals of other requests. Layers are decoder blocks,
counted from 0; in the authors' projections, 0 is the embeddings.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from pydantic import Field

from gradshield.base.registry import NoOptions
from gradshield.data.encode import Example
from gradshield.scoring.base import Context, Prepared, Scorer
from gradshield.scoring.intent.spans import marks_of, without_turn_ends
from gradshield.scoring.states import layer_of, read_states, states_at

EXAMPLES = 100  # of each kind


class DataShieldOptions(NoOptions):
    """Where states are read."""

    layer: int | None = Field(
        default=None, ge=0, description="decoder block to read (default: the one with the highest CAS)"
    )


def prepare(context: Context, options: DataShieldOptions) -> Prepared:
    """Takes the compliance direction of every layer, and the layer where it tells the two kinds apart best."""
    model, ends = context.model, marks_of(context.model.tokenizer).ends
    kinds = [context.fit_anchors[kind][:EXAMPLES] for kind in ("harmful", "refusal")]

    def fit() -> dict[str, np.ndarray]:
        if options.layer is None:
            layers = range(len(model.layers))
            last = (read_states(model, rows, layers, "last", context.batch_tokens) for rows in kinds)
            layer = int(np.argmax([compliance(comply, refuse)[1] for comply, refuse in zip(*last)]))
        else:
            layer = layer_of(model, options.layer)
        words = [[without_turn_ends(e, ends) for e in rows] for rows in kinds]
        comply, refuse = (read_states(model, rows, [layer], "response", context.batch_tokens)[0] for rows in words)
        return {"layer": np.array(layer), "direction": compliance(comply, refuse)[0]}

    fitted = context.cached("direction", fit)
    layer = int(fitted["layer"].item())

    def score(batch: Sequence[Example]) -> Mapping[str, np.ndarray]:
        words = [without_turn_ends(e, ends) for e in batch]
        answer, prompt = (
            states_at(model, words, [layer], place)[0].double().numpy() @ fitted["direction"]
            for place in ("response", "prompt")
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
    version=2,
)
