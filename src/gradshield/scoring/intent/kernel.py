"""A readout that is not linear: logistic regression with a Gaussian kernel, on the means of windows of states.

A linear readout adds up what single words are about. This one compares a window with windows that it was fitted on, so
it can learn that two words mean harm only together. It is the sum over a draw of those windows, the landmarks (the
Nyström method). The log says what it is worth (docs/log.md, "Everyday voices").
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

WINDOW, STRIDE = 8, 4  # tokens that a vector is the mean of, and between the windows
GAMMA = 1.5  # of exp(−γ · squared distance), where the vectors' mean squared length is 1


@dataclass(frozen=True)
class Kernel:
    """Log-odds of a mean of states x = Σ strength · exp(−γ ‖(x − middle) / scale − landmark‖²) + bias."""

    middle: np.ndarray  # float64 [d]
    scale: np.ndarray  # float64 [d]
    landmarks: np.ndarray  # float16 [m, d]
    strength: np.ndarray  # float64 [m]
    bias: float


def windows(positions: np.ndarray) -> list[np.ndarray]:
    """The positions of each window: every `STRIDE`-th, and the last; of fewer than a window, all of them."""
    last = len(positions) - WINDOW
    if last <= 0:
        return [positions]
    starts = [*range(0, last, STRIDE), last]
    return [positions[start : start + WINDOW] for start in starts]


def window_means(states: Tensor, places: Sequence[np.ndarray]) -> Tensor:
    """Means [windows, d] float32 of the states [tokens, d] at the positions of each window."""
    at, part = np.zeros((len(places), WINDOW), dtype=np.int64), np.zeros((len(places), WINDOW), dtype=np.float32)
    for n, each in enumerate(places):
        at[n, : len(each)], part[n, : len(each)] = each, 1 / len(each)
    found = states[torch.from_numpy(at).to(states.device)].float()
    return (found * torch.from_numpy(part).to(states.device)[..., None]).sum(1)


def similarities(vectors: Tensor, landmarks: Tensor) -> Tensor:
    """exp(−γ · squared distance) [n, m] of vectors [n, d] and landmarks [m, d]."""
    return torch.exp(-GAMMA * torch.cdist(vectors, landmarks, compute_mode="use_mm_for_euclid_dist").square())


def kernel_log_odds(kernel: Kernel, means: Tensor) -> np.ndarray:
    """float64 [n]: what the readout says of means of states [n, d]."""
    middle, scale, landmarks, strength = (
        torch.from_numpy(np.asarray(each, dtype=np.float32)).to(means.device)
        for each in (kernel.middle, kernel.scale, kernel.landmarks, kernel.strength)
    )
    near = similarities((means - middle) / scale, landmarks)
    return (near @ strength).cpu().double().numpy() + kernel.bias
