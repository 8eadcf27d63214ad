"""Scores that exist only for the rows of one file, because all of them are computed together."""

from collections.abc import Callable, Sequence

import numpy as np

from gradshield.data.encode import Example
from gradshield.scoring.base import Context, ScoreFunction, Scores
from gradshield.scoring.engine import example_digest


def file_scores(context: Context, make: Callable[[list[Example]], np.ndarray]) -> ScoreFunction:
    """A scorer that looks a row up in what `make` returned [N] for the file's distinct rows; cached. Any other row is
    set aside."""

    def fit() -> dict[str, np.ndarray]:
        distinct = {example_digest(e): e for e in context.examples}
        keys = np.frombuffer(b"".join(distinct), dtype=np.uint8).reshape(len(distinct), -1)
        return {"keys": keys, "scores": np.asarray(make(list(distinct.values())), dtype=np.float64)}

    fitted = context.cached("rows", fit)
    known = {key.tobytes(): value for key, value in zip(fitted["keys"], fitted["scores"].tolist())}

    def score(batch: Sequence[Example]) -> Scores:
        values = np.array([known.get(example_digest(e), np.nan) for e in batch])
        reason = f"{context.scorer.name} scores only rows of the file that it was fitted on"
        missing = [n for n, e in enumerate(batch) if example_digest(e) not in known]
        return Scores({"score": values}, dict.fromkeys(missing, reason))

    return score
