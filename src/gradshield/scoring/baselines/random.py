"""`random`: as many rows removed, chosen by chance. What any other score must beat at the same size.

score(z) = a number in [0, 1) that follows from the row's tokens and the seed alone, so it does not change with the
order of the file, a restart or a worker. Equal rows have equal numbers. Use it with `--threshold share`.
"""

from collections.abc import Mapping, Sequence
from hashlib import blake2b

import numpy as np
from pydantic import Field

from gradshield.base.registry import NoOptions
from gradshield.data.encode import Example
from gradshield.scoring.base import Context, Prepared, Scorer


class RandomOptions(NoOptions):
    """The draw."""

    seed: int = Field(default=0, ge=0, description="seed of the random draw")


def prepare(context: Context, options: RandomOptions) -> Prepared:
    """Nothing to fit."""

    def draw(example: Example) -> float:
        digest = blake2b(example.ids.tobytes() + example.mask.tobytes(), digest_size=8, key=str(options.seed).encode())
        return (int.from_bytes(digest.digest(), "big") >> 11) / 2**53

    def score(batch: Sequence[Example]) -> Mapping[str, np.ndarray]:
        return {"score": np.array([draw(example) for example in batch])}

    return Prepared(score)


SCORER = Scorer(
    "random", "removes rows at random; the control for other scorers", prepare, options=RandomOptions, cost=0.0
)
