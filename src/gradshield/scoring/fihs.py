"""FIHS in its variants, as scorers: the paper's raw dot, and normalised ones that short answers do not break (5b)."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from gradshield.data.encode import Example
from gradshield.model import Model
from gradshield.probe import ProbeGradient
from gradshield.scoring.contraction import contract, directions
from gradshield.scoring.run import Scorer

VARIANTS = ("paper", "cosine", "module")
DIRECTIONS = 16  # random rank-one directions for the norms


def fihs_scorer(model: Model, probe: ProbeGradient, variant: str) -> Scorer:
    """A scorer with the columns "score" and "loss".

    `paper`: ⟨∇L, ∇S⟩ (eq. 4). `cosine`: divided by ‖∇L‖. `module`: the mean over modules of each one's dot divided by
    its own ‖∇L_m‖; both norms are estimated, the same way for every row.
    """
    random = directions(probe.factors, DIRECTIONS) if variant != "paper" else None

    def scorer(batch: Sequence[Example]) -> Mapping[str, np.ndarray]:
        result = contract(model, batch, probe, random)
        if variant == "paper" or result.norms is None:
            score = result.dots.sum(1)
        elif variant == "cosine":
            score = result.dots.sum(1) / result.norms.sum(1).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
        else:
            score = (result.dots / result.norms.sqrt().clamp_min(torch.finfo(torch.float32).tiny)).mean(1)
        return {"score": score.double().numpy(), "loss": result.loss.double().numpy()}

    return scorer
