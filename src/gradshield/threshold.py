"""Scores → the threshold at and above which rows are quarantined: the paper's A1, anchored, fixed, a share."""

from dataclasses import dataclass

import numpy as np
from scipy.stats import norm
from sklearn.mixture import GaussianMixture

from gradshield.base.errors import UserError


@dataclass(frozen=True)
class Threshold:
    """Rows whose score is at or above `value` are quarantined; infinite where nothing is to be removed."""

    value: float
    rule: str
    note: str  # in plain words, how sure it is
    clear: bool = False  # two groups are seen, with next to nothing between them
    good_lost: float | None = None  # expected number of good rows quarantined
    harmful_kept: float | None = None  # expected number of harmful rows kept


def a1(scores: np.ndarray, alpha: float = 10.0) -> Threshold:
    """Algorithm A1: t = min(max of component 0, max of component 1) of a two-Gaussian fit if LogL2 − LogL1 > alpha,
    else μ + 2σ.

    Scores are standardised for the fit, and non-finite ones never enter it. With fewer than two distinct scores nothing
    is removed.
    """
    finite = scores[np.isfinite(scores)]
    if len(np.unique(finite)) < 2:
        return Threshold(np.inf, "a1", "all scores are equal: nothing to tell apart")
    mean, spread = finite.mean(), finite.std()
    z = ((finite - mean) / spread)[:, None]
    one = norm.logpdf(z, z.mean(), z.std()).sum()
    mixture = GaussianMixture(2, n_init=3, random_state=0).fit(z)
    gain = mixture.score_samples(z).sum() - one
    labels = mixture.predict(z)
    if gain > alpha and 0 < labels.sum() < len(labels):
        value = min(finite[labels == 0].max(), finite[labels == 1].max())
        return Threshold(float(value), "a1", f"two groups (log-likelihood gain {gain:.0f} > {alpha:g})", True)
    return Threshold(float(mean + 2 * spread), "a1", f"one group (gain {gain:.0f} ≤ {alpha:g}): mean + 2 spreads")


def fixed(value: float) -> Threshold:
    """The threshold that the user names."""
    return Threshold(value, "fixed", "set by hand")


def share(scores: np.ndarray, fraction: float) -> Threshold:
    """The threshold that quarantines the highest `fraction` of the scored rows (ties together).

    Raises UserError unless 0 ≤ fraction ≤ 1.
    """
    if not 0 <= fraction <= 1:
        raise UserError(f"--value {fraction:g}: a share lies between 0 and 1")
    finite = np.sort(scores[np.isfinite(scores)])
    count = round(fraction * len(finite))
    value = finite[len(finite) - count] if count else np.inf
    return Threshold(float(value), "share", f"the highest {fraction:.1%} of the rows, whatever they are")


def anchored(scores: np.ndarray, good: np.ndarray, harmful: np.ndarray) -> Threshold:
    """The middle between the good anchors' 99 % quantile and the harmful anchors' 5 % quantile.

    Only anchors set it, so it is as right in a clean file as in one that is nine tenths poison; `good` may hold the
    user's own known-good rows. What the file adds is the estimate of how many rows fall on the wrong side.
    Raises UserError when the anchors of the two kinds can't be told apart.
    """
    good, harmful = good[np.isfinite(good)], harmful[np.isfinite(harmful)]
    if not len(good) or not len(harmful):
        raise UserError(
            "the anchors have no finite scores with this model and variant: try --dtype float32 or bfloat16, or "
            "--variant intent"
        )
    upper, lower = float(np.quantile(good, 0.99)), float(np.quantile(harmful, 0.05))
    if np.median(harmful) <= upper:
        raise UserError(
            "the anchors can't be told apart with this model and variant, so no threshold follows from them: "
            "try --variant intent, another model, or --threshold a1"
        )
    value = (upper + lower) / 2
    finite = scores[np.isfinite(scores)]
    above = int((finite >= value).sum())
    lost, missed = float((good >= value).mean()), float((harmful < value).mean())
    # rows at or above = harmful (1 − missed) + good · lost, with harmful + good = all scored rows
    poison = min(max((above - len(finite) * lost) / max(1 - missed - lost, 1e-9), 0.0), float(len(finite)))
    margin = 0.25 * (np.median(harmful) - np.median(good))
    near = int((np.abs(finite - value) < margin / 2).sum())
    clear = above > 0 and near <= max(1, 0.02 * len(finite))
    if not above:
        note = "one group: no row comes near the harmful anchors"
    elif clear:
        note = f"two clear groups: {near} of {len(finite)} rows lie near the threshold"
    else:
        note = f"no clear gap: {near} of {len(finite)} rows lie near the threshold; look at the borderline rows"
    return Threshold(value, "anchored", note, clear, (len(finite) - poison) * lost, poison * missed)
