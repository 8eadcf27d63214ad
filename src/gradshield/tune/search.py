"""Algorithm 1: how many rows, in ascending order of score, can be trained on before the model stops refusing?

This is only the search. Training and measuring are a callable, so the same code runs with an 8B model, in a study, and
in a test without a model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, floor, inf, sqrt

import numpy as np

from gradshield.threshold import Threshold, is_kept

ALL_ROWS = "trained on every row but those set aside or held out"


@dataclass(frozen=True)
class Trial:
    """One fine-tuning of the search: the rows that it trained on, and the figures of its model."""

    number: int  # from 1
    threshold: float | None  # None: no row was left out for its score
    lo: int  # ranks in ascending order of score: the search is between lo and up
    up: int
    kept: int  # rows trained on
    asr: float | None  # None where the training failed
    utility: float | None  # None where it was not measured, the trial being unsafe already
    safe: bool
    useful: bool
    note: str = ""


@dataclass(frozen=True)
class Outcome:
    """How the search ended. `accepted` is the trial whose model is the result, `best` has the safest model."""

    accepted: Trial | None
    best: Trial | None
    trials: tuple[Trial, ...]
    reason: str


Measure = Callable[[Trial, np.ndarray], Trial]
"""(the trial before the training, indices of the rows to train on) → the trial with its figures."""


def search(
    scores: Callable[[], np.ndarray],
    guess: Callable[[np.ndarray, int], Threshold],
    measure: Measure,
    rows: int,
    *,
    screen_first: bool,
    max_searches: int = 3,
    step: float = 0.05,
    literal: bool = False,
) -> Outcome:
    """Measures trials until one is accepted or none can be, and returns the outcome (alg. 1).

    `scores()` is called when they are first needed: with the paper's start, not before a first model trained on
    everything turned out unsafe. `guess(scores in play, which guess)` is Tguess; `step` is λ; `max_searches` N_max.
    `screen_first` skips that first model when the guess is sure of harmful rows (see `surely_unsafe`). `literal`
    reads two lines as printed: that first model is taken when it is safe, whatever its utility, where otherwise it must
    be useful, too; and in line 12 the rows below the lower end of the search are not trained on either, where otherwise
    they are, being the safest.
    Scores are finite, or inf for a row that has none; equal ones stay together, so a rank is the number of rows
    strictly below the threshold. Every guess closes the search, by one rank at least.
    """
    trials: list[Trial] = []
    everything = np.arange(rows)

    def outcome(accepted: Trial | None, reason: str) -> Outcome:
        best = min((t for t in trials if t.asr is not None), key=lambda t: (t.asr, -t.kept), default=None)
        return Outcome(accepted, accepted or best, tuple(trials), reason)

    def run(threshold: float | None, chosen: np.ndarray, lo: int, up: int) -> Trial:
        number, kept = len(trials) + 1, len(chosen)
        trials.append(measure(Trial(number, threshold, lo, up, kept, None, None, False, False), chosen))
        return trials[-1]

    first = guess(scores(), 0) if screen_first else None
    skips = first is not None and surely_unsafe(first, scores(), step)
    if not skips:
        trial = run(None, everything, 0, rows)
        if trial.safe:
            if trial.useful or literal:
                found = "safe and useful" if trial.useful else f"safe, but {trial.note}"
                return outcome(trial, f"{ALL_ROWS}: {found}")
            return outcome(None, f"{ALL_ROWS}: safe, but {trial.note}")
    value = scores()
    ordered = np.sort(value)
    lo, up, number = 0, int(np.isfinite(ordered).sum()), 0
    while (least := int(np.searchsorted(ordered, ordered[lo], "right"))) < up:  # just above the tie at the lower end
        if number == max_searches:
            return outcome(None, f"no model was both safe and useful within {max_searches} searches")
        if number == 0 and first is not None and skips:
            t = first.value  # nothing was found unsafe yet, so the guess is not clamped
        else:
            t = _clamp(guess(ordered[lo:up], number).value, ordered, lo, up, step)
        below = int(np.searchsorted(ordered, t))
        if below <= lo:  # the same rows once more, or none
            t, below = float(ordered[least]), least
        below_t = is_kept(value, t)
        chosen = np.flatnonzero(below_t & ~is_kept(value, ordered[lo]) if literal else below_t)
        trial = run(t, chosen, lo, up)
        if trial.safe and trial.useful:
            return outcome(trial, "safe and useful")
        lo, up, number = (below, up, number + 1) if trial.safe else (lo, below, number + 1)
    closed = "the search ended without a model that is both safe and useful"
    return outcome(None, closed if lo else "no row is left to train on")


def leaves_nothing(guess: Threshold, scores: np.ndarray, step: float) -> bool:
    """Whether no more than the share `step` (λ) of the scored rows is below the guess, as few as alg. 1 ever trains on.

    One low outlier makes A1 say so of a clean file, so it takes a training to believe it.
    """
    return bool(is_kept(scores, guess.value).sum() <= step * np.isfinite(scores).sum())


def surely_unsafe(guess: Threshold, scores: np.ndarray, step: float) -> bool:
    """Whether a model trained on every row is sure to be unsafe. Rows are at or above the guess, and either two clear
    groups are seen or they are more than good rows account for, by three standard deviations of a count. A guess that
    leaves nothing is never sure."""
    above = int((~is_kept(scores, guess.value)).sum())
    lost = guess.good_lost if guess.good_lost is not None else inf
    sure = guess.clear or above > lost + 3 * sqrt(max(lost, 1.0))
    return above > 0 and sure and not leaves_nothing(guess, scores, step)


def _clamp(t: float, ordered: np.ndarray, lo: int, up: int, step: float) -> float:
    """t between the scores at ranks lo' = ⌊lo (1 − λ) + up λ⌋ and up' = ⌈up (1 − λ) + lo λ⌉ of alg. 1, so that every
    trial closes the search by at least λ of it."""
    low, high = floor(lo * (1 - step) + up * step), ceil(up * (1 - step) + lo * step)
    return float(np.clip(t, ordered[low], ordered[min(high, up - 1)]))
