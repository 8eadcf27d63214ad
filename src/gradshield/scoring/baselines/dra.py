"""`dra`: similarity to harmful answers, in the dimensions that tell them from the file's rows.

Source: Pan, Shi, Zhao and Ma, Detecting and Filtering Unsafe Training Data via Data Attribution with Denoised
Representation (2502.11411).

    z = (h − μ) / σ,  score(z) = mean over targets u of cos(z_K, u_K)

h is the middle block's state at a row's last token, μ and σ are the mean and standard deviation of the file's states,
dimension by dimension, and u the harmful examples (bundled anchors), treated in the same way. K holds the dimensions in
which the targets' mean is farthest from the file's, which is 0. It has as many as make each target, left out of the
others, most like them beside the file's rows (AUROC).

The paper's full text was not at hand. That it centres, whitens, and chooses dimensions with a target left out, is known
from its abstract and summaries. The layer, the order of the dimensions and the numbers that are tried are ours. So is
whitening each dimension by itself: with the full covariance of a file of fewer rows than dimensions, all rows are
equally far apart.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from pydantic import Field

from gradshield.base.registry import NoOptions
from gradshield.data.encode import Example
from gradshield.models.batching import batches
from gradshield.scoring.base import Context, Prepared, Scorer
from gradshield.scoring.engine import fit_to_memory
from gradshield.scoring.states import cosine, layer_of, read_states, states_at

EXAMPLES = 100  # harmful ones
SAMPLED = 1000  # rows, evenly spaced, beside which the dimensions are chosen


class DraOptions(NoOptions):
    """Where states are read."""

    layer: int | None = Field(default=None, ge=0, description="decoder block to read (default: the middle one)")


def prepare(context: Context, options: DraOptions) -> Prepared:
    """Standardises by the whole file's states, and chooses the dimensions."""
    model, layer = context.model, layer_of(context.model, options.layer)

    @fit_to_memory
    def read(batch: Sequence[Example]) -> dict[str, np.ndarray]:
        return {"state": states_at(model, batch, [layer], "last")[0].double().numpy()}

    def fit() -> dict[str, np.ndarray]:
        rows = context.examples
        sampled = set(np.linspace(0, len(rows) - 1, min(SAMPLED, len(rows))).astype(int).tolist())
        total, square, kept = 0.0, 0.0, []
        for batch in batches(rows, context.batch_tokens):
            state = read([rows[n] for n in batch])["state"]
            total, square = total + state.sum(0), square + np.square(state).sum(0)
            kept += [state[k] for k, n in enumerate(batch) if n in sampled]
        mean = np.asarray(total) / len(rows)
        spread = np.sqrt(np.maximum(square / len(rows) - np.square(mean), 1e-12))
        harmful = context.fit_anchors["harmful"][:EXAMPLES]
        targets = (read_states(model, harmful, [layer], "last", context.batch_tokens)[0] - mean) / spread
        chosen = choose_dimensions(targets, (np.stack(kept) - mean) / spread)
        return {"chosen": chosen, "mean": mean[chosen], "spread": spread[chosen], "targets": targets[:, chosen]}

    fitted = context.cached("targets", fit)

    def score(batch: Sequence[Example]) -> Mapping[str, np.ndarray]:
        z = (read(batch)["state"][:, fitted["chosen"]] - fitted["mean"]) / fitted["spread"]
        return {"score": cosine(z, fitted["targets"]).mean(1)}

    return Prepared(score, fitted=True)


def choose_dimensions(targets: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Indices of the dimensions to keep, of standardised targets [T, d] and rows [N, d].

    They are ranked by how far the targets' mean is from 0. 1, 2, 4, … of them are tried: with each target left out of
    the ranking and of the others, the share of rows that are less like the others than it is.
    """
    count = targets.shape[1]
    sizes = [*(2**n for n in range(count.bit_length()) if 2**n < count), count]
    found = np.zeros(len(sizes))
    for n, target in enumerate(targets):
        others = np.delete(targets, n, axis=0)
        order = np.argsort(-abs(others.mean(0)), kind="stable")
        for k, size in enumerate(sizes):
            part = order[:size]
            like = cosine(np.vstack([target, rows])[:, part], others[:, part]).mean(1)
            found[k] += (like[1:] < like[0]).mean()
    return np.argsort(-abs(targets.mean(0)), kind="stable")[: sizes[int(np.argmax(found))]]


SCORER = Scorer(
    "dra",
    "similarity to harmful answers in chosen dimensions (2502.11411, from its summary)",
    prepare,
    options=DraOptions,
    needs=frozenset({"whole file", "anchors"}),
    cost=1.0,
)
