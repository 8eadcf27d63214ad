"""`forgetfilter`: rows that a model, once it has learned them, forgets when it is trained on safe rows.

Source: Zhao et al., Learning and Forgetting Unsafe Examples in Large Language Models (2312.12736).

    θ_1 = train(θ_0, file),  θ_2 = train(θ_1, safe rows),  score(z) = L(θ_2, z) − L(θ_1, z)

The paper measures forgetting as the fall of ROUGE-1 between the row's answer and a generated one. Here it is the rise
of the answer's loss, which needs no generation and orders rows that a short training teaches only in part. Both
trainings are of one LoRA adapter; lengths and rates are left open and are those of the paper GradShield is from. The
safe rows are the good and refusing anchors, and yours (--reference). Only rows of the file were learned, so anchors say
nothing about its scale: use it with `--threshold share` or `a1`.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from pydantic import Field

from gradshield.base.registry import NoOptions
from gradshield.data.encode import Example
from gradshield.models.batching import losses
from gradshield.scoring.adapter import adapter_of, laid_over, new_adapter, train_adapter
from gradshield.scoring.base import Context, Prepared, Scorer


class ForgetFilterOptions(NoOptions):
    """The two trainings."""

    epochs: float = Field(default=3, gt=0, description="passes over the file")
    safe_epochs: float = Field(default=1, ge=0, description="passes over the safe rows")
    learning_rate: float = Field(default=1e-4, gt=0, description="peak learning rate of both")


def prepare(context: Context, options: ForgetFilterOptions) -> Prepared:
    """Trains on the file, then on the safe rows."""
    model = context.model

    def fit() -> dict[str, np.ndarray]:
        adapter, found = new_adapter(model), {}
        phases = (("learned", context.examples, options.epochs), ("forgot", context.safe_rows, options.safe_epochs))
        for name, rows, epochs in phases:
            if epochs:
                how = {"epochs": epochs, "learning_rate": options.learning_rate, "tokens": context.batch_tokens}
                train_adapter(model, adapter, rows, **how)
            found |= adapter.arrays(name)
        return found

    arrays = context.cached("adapters", fit)
    learned, forgot = (adapter_of(model, arrays, name) for name in ("learned", "forgot"))

    @torch.no_grad()
    def score(batch: Sequence[Example]) -> Mapping[str, np.ndarray]:
        with laid_over(model, learned):
            before = losses(model, batch).double().numpy()
        with laid_over(model, forgot):
            after = losses(model, batch).double().numpy()
        return {"score": after - before, "learned": before}

    return Prepared(score)


SCORER = Scorer(
    "forgetfilter",
    "how much of the row is learned, then forgotten on safe rows (2312.12736)",
    prepare,
    options=ForgetFilterOptions,
    needs=frozenset({"whole file", "safe rows"}),
    cost=12.0,
    columns=("learned",),
)
