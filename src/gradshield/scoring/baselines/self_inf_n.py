"""`self-inf-n`: rows that the model would learn most from, made even for short and long answers.

Source: Guan et al., Benign Samples Matter! Fine-tuning On Outlier Benign Samples Severely Breaks Safety (2505.06843).

    score(z) = log(‖∇_θ ℓ(z)‖² + 1) + log(len(a) + 1)

ℓ is the mean cross-entropy of the answer a, whose length is in tokens. The paper picks the highest hundred to attack
with, so a filter removes the highest. The paper's θ is every weight; here it is the decoder's Linears, as for FIHS. The
norm is exact, ‖Σ_t δ_t x_tᵀ‖² = Σ_{t,t'} (x_t·x_t')(δ_t·δ_t'), and no gradient of a row is formed. The authors' code
(GuanZihan/Benign-Samples-Matter, online_gradient/rank.py) drops rows with the answer "No", "no" or "yes", or an empty
one, from its hundred; here they keep their score.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from gradshield.base.registry import NoOptions
from gradshield.data.encode import Example
from gradshield.scoring.base import Context, Prepared, Scorer
from gradshield.scoring.fihs.contraction import contract
from gradshield.scoring.fihs.descent import no_gradient


def prepare(context: Context, options: NoOptions) -> Prepared:
    """Nothing to fit."""
    model, zero = context.model, no_gradient(context.model)

    def score(batch: Sequence[Example]) -> Mapping[str, np.ndarray]:
        norms = contract(model, batch, zero, exact_norms=True).norms
        assert norms is not None
        influence = norms.double().sum(1).numpy()
        length = np.array([int(e.mask.sum()) for e in batch], dtype=float)
        return {"score": np.log(influence + 1) + np.log(length + 1), "self_influence": influence}

    return Prepared(score)


SCORER = Scorer(
    "self-inf-n",
    "norm of the row's gradient, corrected for the answer's length (2505.06843)",
    prepare,
    cost=3.5,
    columns=("self_influence",),
)
