"""`tracin`: how much a step on the row lowers the loss of harmful compliance.

Source: Pruthi et al., Estimating Training Data Influence by Tracing Gradient Descent (2002.08484), TracInCP.

    score(z) = Σ_k η_k ⟨∇L(θ_k, z), mean over z' of ∇L(θ_k, z')⟩

The z' are harmful requests with openings of compliant answers (bundled anchors). Model θ_1 is the aligned one. With
`checkpoints` above 1, the others are taken at even distances from one epoch of LoRA training on the file. Rate η_k is
that of the training at the checkpoint; with one checkpoint, η = 1. The paper takes checkpoints of the training whose
influence is asked for. A filter does not have them yet, so the default is the one at its start. Gradients are of the
decoder's Linears, and not normalised: short answers at high loss dominate, as in the paper.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from pydantic import Field

from gradshield.base.registry import NoOptions
from gradshield.data.encode import Example
from gradshield.scoring.adapter import Adapter, adapter_of, laid_over, new_adapter, train_adapter
from gradshield.scoring.base import Context, Prepared, Scorer
from gradshield.scoring.fihs.contraction import contract
from gradshield.scoring.fihs.descent import loss_gradient


class TracInOptions(NoOptions):
    """Targets and checkpoints."""

    targets: int = Field(default=32, ge=1, description="harmful anchors whose loss counts, z'")
    checkpoints: int = Field(default=1, ge=1, description="1: the aligned model; more: along a training on the file")
    learning_rate: float = Field(default=1e-4, gt=0, description="peak learning rate of that training")


def prepare(context: Context, options: TracInOptions) -> Prepared:
    """Trains for the checkpoints, where more than one is asked for, and takes the targets' gradient at each."""
    model, more = context.model, options.checkpoints - 1

    def fit() -> dict[str, np.ndarray]:
        adapter, found, rates = new_adapter(model), dict[str, np.ndarray](), [options.learning_rate]

        def keep(share: float, rate: float) -> None:
            if share >= len(rates) / more - 1e-9:
                found.update(adapter.arrays(str(len(rates) - 1)))
                rates.append(rate)

        how = {"epochs": 1, "learning_rate": options.learning_rate, "tokens": context.batch_tokens}
        train_adapter(model, adapter, context.examples, **how, after=keep)
        return found | {"rates": np.array(rates)}

    arrays = context.cached("checkpoints", fit) if more else {"rates": np.ones(1)}
    rates = arrays["rates"]  # a training shorter than that has fewer
    adapters = [Adapter({}, {}), *(adapter_of(model, arrays, str(k)) for k in range(len(rates) - 1))]
    targets = context.fit_anchors["harmful"][: options.targets]
    gradients = []
    for adapter in adapters:
        with laid_over(model, adapter):
            gradients.append(loss_gradient(model, targets))

    def score(batch: Sequence[Example]) -> Mapping[str, np.ndarray]:
        total = np.zeros(len(batch))
        for adapter, gradient, rate in zip(adapters, gradients, rates):
            with laid_over(model, adapter):
                total += rate * contract(model, batch, gradient).dots.double().sum(1).numpy()
        return {"score": total}

    return Prepared(score, fitted=True)


SCORER = Scorer(
    "tracin",
    "how far a step on the row lowers the loss of harmful answers (2002.08484)",
    prepare,
    options=TracInOptions,
    needs=frozenset({"anchors", "whole file"}),
    cost=2.5,
)
