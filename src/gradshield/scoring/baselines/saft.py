"""`saft`: the rows that lie farthest along the direction in which the file's hidden states vary most.

Source: Choi, Du and Li, Safety-Aware Fine-Tuning of Large Language Models (2410.10014).

    Z = U Σ Vᵀ,  score(z) = mean over the first k of ⟨z, v_j⟩²

Z holds the states of the whole file, one last-token state a row, and k = 1 is the paper's main setting. The paper picks
the layer and the threshold on labelled rows, which a user does not have: the layer here is the middle one. It does not
depend on labels, so where the file varies most in something else than harm, that is what it scores. States are centred
first (`centre=false` leaves that out): else v_1 is next to the mean state of any text.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from pydantic import Field

from gradshield.base.registry import NoOptions
from gradshield.data.encode import Example
from gradshield.models.batching import batches
from gradshield.scoring.base import Context, Prepared, Scorer
from gradshield.scoring.engine import fit_to_memory
from gradshield.scoring.states import layer_of, states_at


class SaftOptions(NoOptions):
    """Where states are read, and how many directions count."""

    layer: int | None = Field(default=None, ge=0, description="decoder block to read (default: the middle one)")
    components: int = Field(default=1, ge=1, description="singular vectors that count, k")
    centre: bool = Field(default=True, description="subtract the file's mean state")


def prepare(context: Context, options: SaftOptions) -> Prepared:
    """Takes the singular vectors of the whole file's states."""
    layer = layer_of(context.model, options.layer)

    @fit_to_memory
    def read(batch: Sequence[Example]) -> dict[str, np.ndarray]:
        return {"state": states_at(context.model, batch, [layer], "last")[0].double().numpy()}

    def fit() -> dict[str, np.ndarray]:
        rows = context.examples
        parts = (read([rows[n] for n in batch])["state"] for batch in batches(rows, context.batch_tokens))
        return dict(zip(("mean", "vectors"), principal_directions(parts, options.components, options.centre)))

    fitted = context.cached("directions", fit)

    def score(batch: Sequence[Example]) -> Mapping[str, np.ndarray]:
        state = read(batch)["state"]  # float64 [B, d]
        return {"score": np.square((state - fitted["mean"]) @ fitted["vectors"]).mean(1)}

    return Prepared(score)


def principal_directions(parts, count: int, centre: bool) -> tuple[np.ndarray, np.ndarray]:
    """(mean [d], the first right singular vectors [d, count]) of the rows in all parts [n, d]; the rows themselves are
    not kept, as ZᵀZ has the same vectors."""
    total, square, rows = 0.0, 0.0, 0
    for part in parts:
        total, square, rows = total + part.sum(0), square + part.T @ part, rows + len(part)
    mean = np.asarray(total) / rows * centre
    _, vectors = np.linalg.eigh(square - rows * np.outer(mean, mean))  # ascending
    return mean, vectors[:, ::-1][:, :count]


SCORER = Scorer(
    "saft",
    "projection on the top singular vector of the file's states (2410.10014)",
    prepare,
    options=SaftOptions,
    needs=frozenset({"whole file"}),
    cost=1.0,
)
