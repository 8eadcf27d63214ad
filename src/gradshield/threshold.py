"""Scores → the threshold at and above which rows are quarantined: the paper's A1, anchored, fixed, a share."""

import warnings
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from gradshield.base.errors import UserError

if TYPE_CHECKING:
    from sklearn.mixture import GaussianMixture  # slow to import

STARTED_ON = 2000  # rows, at evenly spaced ranks, that choose where EM starts
ANCHORS_COUNT = 50  # rows that the anchors of a kind count as, beside those of the file (docs/log.md)
SAMPLED = 50_000  # rows, at evenly spaced ranks, that tell how far the groups of a file are apart
FEW_ROWS = 50  # below this, a1 warns
OUTLIERS = 0.02  # a1 warns of a group with a smaller share of the rows


@dataclass(frozen=True)
class Threshold:
    """Rows whose score is at or above `value` are quarantined. `value` is infinite if nothing is to be removed."""

    value: float
    rule: str
    note: str  # in plain words, how sure it is
    clear: bool = False  # two groups are seen, with next to nothing between them
    good_lost: float | None = None  # expected number of good rows quarantined
    harmful_kept: float | None = None  # expected number of harmful rows kept


def is_kept(scores: np.ndarray, value: float) -> np.ndarray:
    """bool [rows]: whether the score is below the threshold `value`. A score equal to it is quarantined, and a row
    without a score (NaN) is not kept.
    """
    return scores < value


def a1(scores: np.ndarray, alpha: float = 10.0) -> Threshold:
    """Algorithm A1: t = min(max of component 0, max of component 1) of a two-Gaussian fit if LogL2 − LogL1 > alpha,
    else μ + 2σ.

    Scores are standardised for the fit, and non-finite ones never enter it. With fewer than two distinct scores nothing
    is removed. The note says where the file is too small or too one-sided for this rule.
    """
    finite = scores[np.isfinite(scores)]
    if len(np.unique(finite)) < 2:
        return Threshold(np.inf, "a1", "all scores are equal: nothing to tell apart")
    from scipy.stats import norm

    mean, spread = finite.mean(), finite.std()
    z = ((finite - mean) / spread)[:, None]
    one = norm.logpdf(z, z.mean(), z.std()).sum()
    mixture = _two_gaussians(z)
    gain = mixture.score_samples(z).sum() - one
    labels = mixture.predict(z)
    sizes = np.bincount(labels, minlength=2)
    if gain > alpha and sizes.all():
        value = min(finite[labels == 0].max(), finite[labels == 1].max())
        note = f"two groups (log-likelihood gain {gain:.0f} > {alpha:g})"
        return Threshold(float(value), "a1", note + _doubts(finite, value, int(sizes.min())), clear=True)
    note = f"one group (gain {gain:.0f} ≤ {alpha:g}): mean + 2 spreads; all rows may be good, or all harmful"
    value = mean + 2 * spread
    return Threshold(float(value), "a1", note + _doubts(finite, value))


def _two_gaussians(z: np.ndarray) -> "GaussianMixture":
    """The likeliest of several fits on evenly spaced ranks, refined on all rows.

    Every fit runs to convergence: scikit-learn's default tolerance stops on a plateau. k-means is not the only start,
    because an outlier traps it.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    sample = _evenly(z, STARTED_ON)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # after max_iter steps a fit is good enough
        fit = partial(GaussianMixture, 2, tol=1e-6, max_iter=1000, random_state=0)
        starts = [fit(init_params="kmeans"), fit(init_params="random_from_data", n_init=10)]
        best = max((start.fit(sample) for start in starts), key=lambda each: each.score(sample))
        inits = {"weights_init": best.weights_, "means_init": best.means_, "precisions_init": best.precisions_}
        return fit(**inits).fit(z)


def _evenly(values: np.ndarray, count: int) -> np.ndarray:
    """The values at that many evenly spaced ranks, or all, ascending."""
    ranks = np.linspace(0, len(values) - 1, min(len(values), count)).round().astype(int)
    return np.sort(values, axis=0)[ranks]


def _doubts(finite: np.ndarray, value: float, smaller: int | None = None) -> str:
    """Why this threshold may be wrong: few rows, a group of outliers, or most of the file above it."""
    doubts = []
    if len(finite) < FEW_ROWS:
        doubts.append(f"{len(finite)} rows are too few for a1")
    if smaller is not None and smaller < OUTLIERS * len(finite):
        doubts.append(f"{smaller} of {len(finite)} rows in one group may be outliers")
    above = int((~is_kept(finite, value)).sum())
    if above > len(finite) / 2:
        doubts.append(f"{above} of {len(finite)} rows are above the threshold, and a1 expects most rows to be good")
    return "".join(f"; warning: {doubt}" for doubt in doubts)


def fixed(value: float) -> Threshold:
    """The threshold that the user gives."""
    return Threshold(value, "fixed", "set by hand")


def share(scores: np.ndarray, fraction: float) -> Threshold:
    """The threshold that quarantines the highest `fraction` of the scored rows (ties together).

    Raises UserError unless 0 ≤ fraction ≤ 1.
    """
    if not 0 <= fraction <= 1:
        raise UserError(f"--value {fraction:g}: a share must be between 0 and 1")
    finite = np.sort(scores[np.isfinite(scores)])
    count = round(fraction * len(finite))
    value = finite[len(finite) - count] if count else np.inf
    return Threshold(float(value), "share", f"the highest {fraction:.1%} of the rows, whatever their scores")


def anchored(scores: np.ndarray, good: np.ndarray, harmful: np.ndarray) -> Threshold:
    """The middle between the good anchors' 95 % quantile and the harmful anchors' 5 % quantile.

    Anchors are harder to tell apart than natural rows, so fewer of those fall on the wrong side (docs/results: real).

    Only anchors set it, so it is as right in a clean file as in one that is nine tenths poison; `good` may hold the
    user's own known-good rows. What the file adds is the estimate of how many rows fall on the wrong side.
    Raises UserError when the anchors of the two kinds can't be told apart.
    """
    good, harmful = good[np.isfinite(good)], harmful[np.isfinite(harmful)]
    if not len(good) or not len(harmful):
        raise UserError(
            "the anchors have no finite scores with this model and scorer: try --dtype float32 or bfloat16, or "
            "--scorer intent"
        )
    upper, lower = float(np.quantile(good, 0.95)), float(np.quantile(harmful, 0.05))
    if np.median(harmful) <= upper:
        raise UserError(
            "the anchors can't be told apart with this model and scorer, so they give no threshold: "
            "try --scorer intent, another model, or --threshold a1"
        )
    value = (upper + lower) / 2
    finite = scores[np.isfinite(scores)]
    kept = is_kept(finite, value)
    above = int((~kept).sum())
    chance = harmful_chance(finite, good, harmful)
    lost, missed = float((1 - chance)[~kept].sum()), float(chance[kept].sum())
    margin = 0.25 * (np.median(harmful) - np.median(good))
    near = int((np.abs(finite - value) < margin / 2).sum())
    clear = above > 0 and near <= max(1, 0.02 * len(finite))
    if not above:
        note = "one group: no row comes near the harmful anchors"
    elif clear:
        note = f"two clear groups: {near} of {len(finite)} rows lie near the threshold"
    else:
        note = f"no clear gap: {near} of {len(finite)} rows lie near the threshold; look at the borderline rows"
    return Threshold(value, "anchored", note, clear, lost, missed)


def harmful_chance(scores: np.ndarray, good: np.ndarray, harmful: np.ndarray) -> np.ndarray:
    """Probability [rows] that each row of a file is harmful, given finite scores of the file and of the anchors.

    The log-odds of a score are a straight line, from a logistic regression on the anchors. Natural rows are easier to
    tell apart than anchors, so the line becomes steeper if the file's two groups are further apart, in units of their
    variance, and flatter if they are nearer; and it moves with the middle between the groups. The groups are found by
    EM, beside ANCHORS_COUNT rows for the anchors of each kind. The share of harmful rows is the likeliest one under
    these odds (Saerens et al. 2002, a new prior for known classes).
    """
    from scipy.special import expit, logit
    from sklearn.linear_model import LogisticRegression

    if not len(scores):
        return scores
    anchors = np.r_[good, harmful]
    middle, unit = anchors.mean(), anchors.std()
    scores, good, harmful, anchors = ((each - middle) / unit for each in (scores, good, harmful, anchors))
    labels = np.repeat([0, 1], [len(good), len(harmful)])
    fit = LogisticRegression(C=1e6, tol=1e-8, class_weight="balanced").fit(anchors[:, None], labels)
    slope, crossing = fit.coef_[0, 0], -fit.intercept_[0] / fit.coef_[0, 0]
    sample = _evenly(scores, SAMPLED)
    known = np.array([good.mean(), harmful.mean()])
    spread = np.array([good.var(), harmful.var()])
    steeper, moved = 1.0, 0.0
    for _ in range(3):  # more change the errors little
        log_odds = steeper * slope * (sample - crossing - moved)
        harmful_share = _likeliest_share(log_odds)
        if harmful_share in (0, 1):
            break  # one group says nothing of how far two are apart
        chance = expit(log_odds + logit(harmful_share))
        weight = np.stack([1 - chance, chance])
        rows = ANCHORS_COUNT + weight.sum(1)
        means = (ANCHORS_COUNT * known + weight @ sample) / rows
        apart = (weight * (sample - means[:, None]) ** 2).sum(1)
        variances = (ANCHORS_COUNT * (spread + (known - means) ** 2) + apart) / rows
        # One thousandth of the anchors' variance is added, for scores of few values.
        steeper = np.diff(means)[0] / np.diff(known)[0] * (spread.sum() + 1e-3) / (variances.sum() + 1e-3)
        moved = (means - known).mean()
    log_odds = steeper * slope * (scores - crossing - moved)
    return expit(log_odds + logit(_likeliest_share(log_odds)))


def _likeliest_share(log_odds: np.ndarray) -> float:
    """The likeliest share of harmful rows, 0 to 1, given each row's log-odds at even shares."""
    from scipy.optimize import root_scalar

    ratio = np.exp(np.clip(log_odds, -30, 30))

    def rise(share: float) -> float:  # of the log-likelihood, falling in the share
        return float(((ratio - 1) / (1 + share * (ratio - 1))).sum())

    if rise(0) <= 0:
        return 0.0
    return 1.0 if rise(1) >= 0 else root_scalar(rise, bracket=(0, 1)).root
