"""`perplexity`: how unlikely the answer is under the model, exp(L), as perplexity filters have it.

Source: perplexity filtering of Alon and Kamfonas, Detecting Language Model Attacks with Perplexity (2308.14132), and
Jain et al., Baseline Defenses for Adversarial Attacks (2309.00614), here on the answer instead of the prompt.

    score(z) = exp( −1/|a| Σ_t log p(a_t | prompt, a_<t) )

Left open: which tokens (all response tokens, the end token among them, as the fine-tuning's loss has them), and a
threshold (the common one).
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from gradshield.base.registry import NoOptions
from gradshield.data.encode import Example
from gradshield.models.batching import losses
from gradshield.scoring.base import Context, Prepared, Scorer


def prepare(context: Context, options: NoOptions) -> Prepared:
    """Nothing to fit."""

    @torch.no_grad()
    def score(batch: Sequence[Example]) -> Mapping[str, np.ndarray]:
        loss = losses(context.model, batch).double().numpy()
        return {"score": np.exp(np.minimum(loss, 700)), "loss": loss}

    return Prepared(score)


SCORER = Scorer("perplexity", "how unlikely the answer is under the model", prepare, columns=("loss",))
