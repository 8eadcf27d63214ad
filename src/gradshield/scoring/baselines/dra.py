"""`dra`: likeness to harmful examples, in a space where what is common to all rows is taken out.

Source: Pan et al., Detecting and Filtering Unsafe Training Data via Data Attribution with Denoised Representation
(2502.11411). Representations are centred and whitened by the training file, and only dimensions that tell the targets
from the file are kept, chosen by leaving one target out:

    y(z) = Λ^(−1/2) Uᵀ (h(z) − μ),  μ and U Λ Uᵀ the file's mean and covariance
    score(z) = cos(y_K(z), mean over targets of y_K)

K are the k dimensions with the largest |mean over targets|: as the file has mean 0 and variance 1 in each, that is how
far the targets stand out. k is the power of two at which a target left out ranks highest among the file's rows, on
average. The paper's own rule for choosing dimensions, its ridge and its representation are not restated in what we
could read; these are ours: states of the last layer at the last token, and a ridge of 1 % of the mean variance.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from pydantic import Field

from gradshield.base.registry import NoOptions
from gradshield.data.encode import Example
from gradshield.scoring.base import Context, Prepared, Scorer
from gradshield.scoring.states import cosine, layer_of, read_states, states_at

SAMPLE = 4000  # rows of the file that the space is fitted on


class DraOptions(NoOptions):
    """Targets, and where states are read."""

    targets: int = Field(default=100, ge=2, description="harmful anchors")
    layer: int | None = Field(default=None, ge=0, description="decoder block that is read (default: the last)")


def prepare(context: Context, options: DraOptions) -> Prepared:
    """Fits the space on the file and the targets."""
    model, last = context.model, len(context.model.layers) - 1
    layer = layer_of(model, last if options.layer is None else options.layer)

    def fit() -> dict[str, np.ndarray]:
        rows = context.examples[:: max(1, len(context.examples) // SAMPLE)]
        of_file, targets = (
            read_states(model, examples, [layer], "last", context.batch_tokens)[0].astype(np.float64)
            for examples in (rows, context.fit_anchors["harmful"][: options.targets])
        )
        mean, whiten = whitening(of_file)
        file, target = (of_file - mean) @ whiten, (targets - mean) @ whiten
        kept = dimensions(file, target)
        return {"mean": mean, "whiten": whiten[:, kept], "target": target[:, kept].mean(0)}

    fitted = context.cached("space", fit)

    def score(batch: Sequence[Example]) -> Mapping[str, np.ndarray]:
        state = states_at(model, batch, [layer], "last")[0].double().numpy()
        return {"score": cosine((state - fitted["mean"]) @ fitted["whiten"], fitted["target"][None])[:, 0]}

    return Prepared(score, fitted=True)


def whitening(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(mean [d], W [d, d]) so that (rows − mean) W has the identity as covariance, but for a ridge."""
    mean = rows.mean(0)
    values, vectors = np.linalg.eigh(np.cov(rows - mean, rowvar=False))
    return mean, vectors / np.sqrt(np.maximum(values, 0) + 0.01 * max(values.mean(), 1e-12))


def dimensions(file: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Indices of the dimensions that are kept, for whitened rows [N, d] and targets [M, d]."""
    width, total = file.shape[1], targets.sum(0)
    counts = [2**n for n in range(width.bit_length()) if 2**n < width] + [width]
    rank = np.zeros(len(counts))
    for target in targets:
        rest = (total - target) / (len(targets) - 1)
        order = np.argsort(-np.abs(rest), kind="stable")
        for n, count in enumerate(counts):
            dims = order[:count]
            likeness = cosine(np.vstack([file[:, dims], target[dims]]), rest[dims][None])[:, 0]
            rank[n] += (likeness[:-1] < likeness[-1]).mean()
    best = counts[int(np.argmax(rank))]
    return np.argsort(-np.abs(total), kind="stable")[:best]


SCORER = Scorer(
    "dra",
    "likeness to harmful examples after whitening by the file (2502.11411)",
    prepare,
    options=DraOptions,
    needs=frozenset({"anchors", "whole file"}),
    cost=1.0,
)
