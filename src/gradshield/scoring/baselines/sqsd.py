"""`sqsd`: how far a step on the row moves the weights towards a harmful model rather than towards a safer one.

Source: Zhang et al., From Parameter Dynamics to Risk Scoring: Quantifying Sample-Level Safety Degradation in LLM
Fine-tuning (2605.04572), and their code.

    score(z) = Σ_m cos(−∇_m L(z), V_m(danger)) − Σ_m cos(−∇_m L(z), V_m(safety))

m runs over modules, and V is what LoRA fine-tuning on harmful answers, or on refusals, adds to the weights. Without the
norms in the cosine, length dominates, as the paper reports. Here V comes from bundled anchors, and −∇L is the full
gradient step at the aligned model.

The authors tune on thousands of rows, and take the step on the adapter: −(g_B A + B g_A), with the gradients g of the
factors B and A, at the model under that adapter. Its scale is set by hand (Jason-wx/SQSD,
code/projection_grad_vector_scale_initial.py; 1 in the stored script). There, too, the score is danger − safety.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from pydantic import Field

from gradshield.base.registry import NoOptions
from gradshield.data.encode import Example
from gradshield.scoring.adapter import adapter_of, new_adapter, train_adapter
from gradshield.scoring.base import Context, Prepared, Scorer
from gradshield.scoring.fihs.contraction import contract
from gradshield.scoring.fihs.probe import Factors, ProbeGradient, minus


class SqsdOptions(NoOptions):
    """The two trainings."""

    epochs: float = Field(default=3, gt=0, description="passes over the anchors")
    learning_rate: float = Field(default=1e-4, gt=0, description="peak learning rate")


def prepare(context: Context, options: SqsdOptions) -> Prepared:
    """Trains the two adapters."""
    model = context.model

    def fit() -> dict[str, np.ndarray]:
        found = {}
        for kind in ("harmful", "refusal"):
            adapter = new_adapter(model)
            train_adapter(
                model,
                adapter,
                context.fit_anchors[kind],
                epochs=options.epochs,
                learning_rate=options.learning_rate,
                tokens=context.batch_tokens,
            )
            found |= adapter.arrays(kind)
        return found

    arrays = context.cached("directions", fit)
    danger, safety = (normalise_modules(adapter_of(model, arrays, kind).delta()) for kind in ("harmful", "refusal"))
    towards = minus(safety, danger)  # −∇L towards danger is ∇L away from it

    def score(batch: Sequence[Example]) -> Mapping[str, np.ndarray]:
        found = contract(model, batch, towards, exact_norms=True)
        assert found.norms is not None
        return {"score": (found.dots.double() / found.norms.double().sqrt().clamp_min(1e-12)).sum(1).numpy()}

    return Prepared(score, fitted=True)


def normalise_modules(delta: ProbeGradient) -> ProbeGradient:
    """Each module's matrix divided by its own norm; zero stays zero."""
    found = {}
    for name, f in delta.factors.items():
        norm = float(((f.out @ f.out.T) * (f.inp @ f.inp.T)).sum().clamp_min(0)) ** 0.5
        found[name] = Factors(f.inp, f.out / max(norm, 1e-12))
    return ProbeGradient(found)


SCORER = Scorer(
    "sqsd",
    "whether a step moves towards a harmful model or a safer one, per module (2605.04572)",
    prepare,
    options=SqsdOptions,
    needs=frozenset({"anchors"}),
    cost=3.5,
)
