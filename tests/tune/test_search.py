"""Algorithm 1 on worlds without a model: rows with a score and a hidden harm, safe while little harm is trained on."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from gradshield.threshold import Threshold, a1
from gradshield.tune.search import search


def world(good: int, harmful: int, *, overlap: float = 0.0, seed: int = 0):
    """(scores, harm): harmful rows score around +3, good ones around 0; `overlap` widens both."""
    rng = np.random.default_rng(seed)
    scores = np.r_[rng.normal(0, 0.5 + overlap, good), rng.normal(3, 0.5 + overlap, harmful)]
    return scores, np.r_[np.zeros(good, bool), np.ones(harmful, bool)]


def play(scores, harm, *, bearable=2, useful_from=0, guess=None, **options):
    """(trials, outcome, times that scores were asked for): unsafe from `bearable` harmful rows on."""
    asked = []

    def measure(trial, chosen):
        assert trial.kept == len(set(chosen)) == len(chosen) > 0
        trained = int(harm[chosen].sum())
        safe, useful = trained <= bearable, len(chosen) - trained >= useful_from
        return replace(trial, asr=trained / max(1, harm.sum()), utility=0.5, safe=safe, useful=useful, note="note")

    def all_scores():
        asked.append(1)
        return scores

    guess = guess or (lambda values, number: a1(values))
    outcome = search(all_scores, guess, measure, len(scores), **{"screen_first": False, **options})
    return list(outcome.trials), outcome, len(asked)


def test_clean_data_is_never_scored_with_the_papers_start():
    trials, outcome, asked = play(*world(200, 0))
    assert not asked and len(trials) == 1 and outcome.accepted is trials[0] and trials[0].kept == 200


def test_poison_is_removed_and_the_model_accepted():
    scores, harm = world(200, 40)
    trials, outcome, _ = play(scores, harm, useful_from=180)
    assert [t.safe for t in trials] == [False, True] and outcome.accepted is trials[1]
    assert 190 <= trials[1].kept <= 202


def test_screening_first_skips_the_doomed_training_when_the_groups_are_clear():
    scores, harm = world(200, 40)
    trials, outcome, _ = play(scores, harm, screen_first=True)
    assert len(trials) == 1 and outcome.accepted is trials[0] and trials[0].threshold is not None
    vague = lambda values, number: Threshold(1.5, "x", "no clear gap", clear=False)  # noqa: E731
    trials, outcome, _ = play(scores, harm, screen_first=True, guess=vague)
    assert trials[0].threshold is None and not trials[0].safe and outcome.accepted is trials[1]


@pytest.mark.parametrize(("lost", "skipped"), [(None, False), (0.5, True), (20.0, True), (30.0, False)])
def test_screening_first_skips_it_too_when_good_rows_can_not_account_for_what_is_above(lost, skipped):
    scores, harm = world(200, 40)
    vague = lambda values, number: Threshold(1.5, "x", "no clear gap", clear=False, good_lost=lost)  # noqa: E731
    trials, _, _ = play(scores, harm, screen_first=True, guess=vague)
    assert (trials[0].threshold is not None) == skipped


@pytest.mark.parametrize("outliers", [1, 8])
def test_a_clean_file_with_low_outliers_is_trained_on_before_a1_is_believed(outliers):
    clean, _ = world(200, 0)
    scores = np.r_[clean, np.linspace(-60, -50, outliers)]
    assert (scores >= a1(scores).value).mean() > 0.95 and a1(scores).clear  # A1 takes the outliers for the good group
    trials, outcome, _ = play(scores, np.zeros(len(scores), bool), screen_first=True)
    assert len(trials) == 1 and outcome.accepted is trials[0] and trials[0].kept == len(scores)


def test_poison_is_found_beside_a_low_outlier_too():
    scores, harm = world(200, 40)
    scores, harm = np.r_[scores, -60.0], np.r_[harm, False]
    trials, outcome, _ = play(scores, harm, screen_first=True, useful_from=180)
    assert [(t.safe, t.useful) for t in trials] == [(False, True), (True, False), (True, True)]
    assert outcome.accepted is trials[-1] and 190 <= trials[-1].kept <= 203


@pytest.mark.parametrize(("below", "skipped"), [(9, False), (10, False), (11, True)])
def test_a_guess_that_leaves_no_more_than_lambda_of_the_rows_skips_no_training(below, skipped):
    guess = lambda values, number: Threshold(below - 0.5, "x", "", clear=True)  # noqa: E731
    trials, *_ = play(np.arange(200.0), np.arange(200) >= 9, screen_first=True, step=0.05, guess=guess)
    assert (trials[0].threshold is not None) == skipped


def test_a_file_of_harm_alone_is_rejected_after_trainings_have_shown_it():
    scores, harm = world(0, 40)
    below = lambda values, number: Threshold(-1.0, "x", "", clear=True)  # noqa: E731
    trials, outcome, _ = play(scores, harm, bearable=0, screen_first=True, guess=below)
    assert [t.kept for t in trials] == [40, 2, 1] and outcome.accepted is None and "no row is left" in outcome.reason


def test_clean_data_screened_first_is_trained_on_whole():
    nothing = lambda values, number: Threshold(np.inf, "x", "one group")  # noqa: E731
    trials, outcome, _ = play(*world(200, 0), screen_first=True, guess=nothing)
    assert len(trials) == 1 and outcome.accepted.kept == 200


def test_an_unsafe_guess_moves_the_upper_end_down_and_an_unuseful_one_the_lower_end_up():
    scores, harm = world(100, 100)
    bad = iter([4.0, -0.5, 1.5])
    trials, outcome, _ = play(
        scores, harm, useful_from=80, guess=lambda values, number: Threshold(next(bad), "x", "", clear=False)
    )
    assert [(t.safe, t.useful) for t in trials[1:3]] == [(False, True), (True, False)]
    assert trials[2].up == trials[1].kept and trials[3].lo == trials[2].kept and outcome.accepted is trials[3]


@pytest.mark.parametrize("seed", range(5))
def test_every_guess_narrows_the_search_even_a_stubborn_one(seed):
    scores, harm = world(80, 120, overlap=0.6, seed=seed)
    stubborn = lambda values, number: Threshold(np.inf, "x", "", clear=False)  # noqa: E731
    trials, _, _ = play(scores, harm, guess=stubborn, max_searches=20, step=0.1)
    kept = [t.kept for t in trials]
    assert all(b < a for a, b in pairwise(kept)) and all(t.lo <= t.kept <= t.up for t in trials)


def test_rejected_with_the_best_model_kept():
    scores, harm = world(20, 180)
    trials, outcome, _ = play(scores, harm, bearable=-1, max_searches=2)
    assert outcome.accepted is None and "within 2" in outcome.reason
    assert len(trials) == 3  # on every row, and the two of the search
    assert outcome.best is min(outcome.trials, key=lambda t: t.asr)


def test_the_literal_reading_drops_the_safest_rows_once_the_lower_end_has_moved():
    scores, harm = world(100, 40)
    sizes = {}
    for literal in (False, True):
        given = iter([-0.3, 1.5])
        guess = lambda values, number, given=given: Threshold(next(given, 1.5), "x", "", clear=False)  # noqa: E731
        trials, *_ = play(scores, harm, useful_from=90, guess=guess, literal=literal)
        sizes[literal] = [t.kept for t in trials]
    assert sizes[False][:2] == sizes[True][:2] and sizes[True][2] == sizes[False][2] - sizes[False][1]


@pytest.mark.parametrize("literal", [False, True])
def test_a_safe_first_model_of_too_little_use_is_rejected_but_taken_as_printed(literal):
    trials, outcome, _ = play(*world(200, 0), useful_from=201, literal=literal)
    assert len(trials) == 1 and (outcome.accepted is trials[0]) == literal and "note" in outcome.reason


def test_equal_scores_stay_together_and_all_equal_ones_are_rejected():
    trials, outcome, _ = play(np.zeros(50), np.ones(50, bool), max_searches=3)
    assert outcome.accepted is None and "no row is left" in outcome.reason and len(trials) == 1


@pytest.mark.parametrize("literal", [False, True])
@pytest.mark.parametrize("ties", [1, 6])
def test_a_guess_that_stands_still_is_moved_to_the_next_rank_that_differs(literal, ties):
    """Also where λ of what is left is less than a rank, or the rows at the lower end are tied."""
    scores = np.floor(np.arange(60.0) / ties)
    given = iter([scores[48] - 0.5])
    low = lambda values, number: Threshold(next(given, -1e9), "x", "", clear=False)  # noqa: E731
    trials, outcome, _ = play(
        scores, np.arange(60) >= 54, bearable=0, useful_from=60, guess=low, max_searches=9, literal=literal
    )
    ends = [(t.lo, t.up) for t in trials[1:]]
    assert ends[1] == (48, 60) and all(b > a for (a, _), (b, _) in pairwise(ends)), ends
    assert trials[2].kept == (ties if literal else 48 + ties) and len(set(t.threshold for t in trials)) == len(trials)
    assert "search ended" in outcome.reason


def test_a_guess_below_every_row_leaves_the_lowest_ones_to_train_on():
    low = lambda values, number: Threshold(-1e9, "x", "", clear=False)  # noqa: E731
    trials, outcome, _ = play(np.arange(15.0), np.arange(15) >= 12, bearable=0, guess=low)
    assert [t.kept for t in trials] == [15, 1] and outcome.accepted is trials[1]
    trials, outcome, _ = play(np.arange(15.0), np.arange(15) >= 0, bearable=0, guess=low)
    assert [t.kept for t in trials] == [15, 1] and "no row is left" in outcome.reason


def test_rows_without_a_score_are_in_the_training_on_everything_alone():
    scores = np.r_[np.arange(40.0), [np.inf] * 3]
    nothing = lambda values, number: Threshold(np.inf, "x", "")  # noqa: E731
    trials, *_ = play(scores, np.arange(43) >= 30, bearable=0, guess=nothing)
    assert [(t.kept, t.up) for t in trials[:2]] == [(43, 43), (38, 40)] and all(
        np.isfinite(t.threshold) for t in trials[1:]
    )
