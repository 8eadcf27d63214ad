"""`seal`: rows that a data selector ranks low while a model is trained on them and on safe rows.

Source: Shen et al., SEAL: Safety-enhanced Aligned LLM Fine-tuning via Bilevel Data Selection (2410.07471), and the
memory-efficient algorithm of their code. With w = N · softmax(p) over the N rows, every step does

    θ ← AdamW of γ L(θ, safe batch) + (1 − γ) mean_i w_i L(θ, z_i)
    p ← AdamW of mean_i w_i L(θ, z_i), θ held

and γ falls from 1 by 0.03 an epoch. score(z) = −p(z). A row that goes against the safe ones keeps a high loss, so its
weight falls. SEAL keeps the highest 80 %: `--threshold share --value 0.2`. Rows must be of the file, so the anchored
threshold has nothing to go by.

γ, its decay, the rate of p and the number of epochs are those of the authors' script for Llama-3 (hanshen95/SEAL,
examples/scripts/train_selector_llama3.sh), not the defaults of their parser (.9, .1, 1e-2). The script trains with
batches of 64, a constant learning rate of 1e-5 and a LoRA of rank 16 and alpha 16 on q_proj and v_proj. Here batches
have 8 rows, and learning rate and adapter are those of GradShield's paper. The paper trains on the full safety set of
its authors; the safe rows here are the good and refusing anchors and yours (--reference).
"""

import numpy as np
import torch
from pydantic import Field

from gradshield.base.progress import progress
from gradshield.base.registry import NoOptions
from gradshield.data.encode import Example
from gradshield.scoring.adapter import backward, laid_over, new_adapter
from gradshield.scoring.base import Context, Prepared, Scorer
from gradshield.scoring.whole_file import file_scores

BATCH = 8


class SealOptions(NoOptions):
    """The bilevel training."""

    epochs: int = Field(default=3, ge=1, description="passes over the file")
    learning_rate: float = Field(default=1e-4, ge=0, description="learning rate of the model's adapter")
    selector_rate: float = Field(default=5e-3, gt=0, description="learning rate of the selector p")
    safe_weight: float = Field(default=1.0, ge=0, le=1, description="weight of the safe rows in the first epoch, γ")
    decay: float = Field(default=0.03, ge=0, le=1, description="decrease of γ after each epoch")


def prepare(context: Context, options: SealOptions) -> Prepared:
    """Trains the selector."""
    return Prepared(file_scores(context, lambda rows: -selector(context, rows, options)))


def selector(context: Context, rows: list[Example], options: SealOptions) -> np.ndarray:
    """p [N] of the rows after the training."""
    model, safe = context.model, context.safe_rows
    adapter = new_adapter(model)
    p = torch.full((len(rows),), 0.1, requires_grad=True)
    betas = (0.9, 0.95)
    of_model = torch.optim.AdamW(
        [*adapter.a.values(), *adapter.b.values()], options.learning_rate, betas, weight_decay=0
    )
    of_p = torch.optim.AdamW([p], options.selector_rate, betas, weight_decay=0)
    draw, size = np.random.default_rng(0), min(BATCH, len(rows))
    with laid_over(model, adapter), progress("training", 0, options.epochs * len(rows)) as advance:
        for epoch in range(options.epochs):
            gamma = max(0.0, options.safe_weight - options.decay * epoch)
            order = draw.permutation(len(rows))
            for start in range(0, len(rows), size):
                chosen = order[start : start + size]
                weight = len(rows) * p.softmax(0)[chosen] / len(chosen)  # [B]
                guide = [safe[n] for n in draw.choice(len(safe), min(BATCH, len(safe)), replace=False)]
                of_model.zero_grad()
                backward(model, adapter, guide, np.full(len(guide), gamma / len(guide)), context.batch_tokens)
                scaled = (1 - gamma) * weight.detach().double().numpy()
                loss = backward(model, adapter, [rows[n] for n in chosen], scaled, context.batch_tokens)
                of_model.step()
                of_p.zero_grad()
                (weight * torch.from_numpy(loss).to(weight)).sum().backward()
                of_p.step()
                advance(0, len(chosen))
    return p.detach().numpy()


SCORER = Scorer(
    "seal",
    "low weight from a data selector that is trained with safe rows (2410.07471)",
    prepare,
    options=SealOptions,
    needs=frozenset({"whole file", "safe rows"}),
    cost=20.0,
    version=2,
)
