"""Every rule on scores whose truth is known, in closed form where there is one, and on the degenerate ones."""

import re

import numpy as np
import pytest
from scipy.stats import norm

from gradshield.base.errors import UserError
from gradshield.threshold import Threshold, a1, anchored, fixed, harmful_chance, share

RNG = np.random.default_rng(0)
GOOD, HARMFUL = RNG.normal(-2, 0.5, 400), RNG.normal(2, 0.5, 200)
# By hand: the 95 % quantile is 1 + .05 · 3, the 5 % quantile −1 + .95 · 4, so the threshold is (1.15 + 2.8) / 2.
GOOD_ANCHORS = np.r_[np.full(190, 1.0), np.full(10, 4.0)]  # 5 % of them are above the threshold
HARMFUL_ANCHORS = np.r_[np.full(5, -1.0), np.full(95, 3.0)]  # 5 % of them are below it
BY_HAND = 1.975


def file(above: int, near: int = 0, rows: int = 1000) -> np.ndarray:
    """Scores of a file: `above` rows over BY_HAND, the others below; `near` of the latter within a quarter of it (an
    eighth of the distance between the anchors' medians)."""
    return np.r_[np.full(above, 3.0), np.full(near, BY_HAND - 0.24), np.full(rows - above - near, BY_HAND - 0.26)]


@pytest.mark.parametrize("poison", [0, 25, 100, 900])
def test_anchored_holds_from_clean_to_nine_tenths_poison(poison):
    scores = np.concatenate([RNG.normal(-2, 0.5, 1000 - poison), RNG.normal(2, 0.5, poison)])
    found = anchored(scores, GOOD, HARMFUL)
    flagged = scores >= found.value
    assert flagged[: 1000 - poison].mean() < 0.01
    assert flagged[1000 - poison :].sum() >= 0.97 * poison
    assert found.good_lost is not None and found.good_lost < 10


def test_anchored_is_the_middle_between_the_95_and_the_5_percent_quantile():
    found = anchored(file(60), np.r_[GOOD_ANCHORS, np.nan], np.r_[HARMFUL_ANCHORS, np.inf])
    assert found.value == pytest.approx(BY_HAND)


# Scores of two values: a logistic regression through two points is exact, so its ratios are .95 / .02 and .05 / .98.
TWO_GOOD = np.r_[np.full(196, -1.0), np.full(4, 1.0)]
TWO_HARMFUL = np.r_[np.full(5, -1.0), np.full(95, 1.0)]


@pytest.mark.parametrize("above", [60, 500, 900])
def test_anchored_expects_the_errors_that_its_anchors_show(above):
    scores = np.r_[np.full(above, 1.0), np.full(1000 - above, -1.0), np.nan, -np.inf]
    found = anchored(scores, TWO_GOOD, TWO_HARMFUL)
    harmful = (above - 1000 * 0.02) / (1 - 0.05 - 0.02)  # above = .95 harmful + .02 (1000 − harmful)
    assert found.good_lost == pytest.approx((1000 - harmful) * 0.02, rel=0.01)
    assert found.harmful_kept == pytest.approx(harmful * 0.05, rel=0.01)


@pytest.mark.parametrize("unit", [1e-6, 1e-3, 1e3])
def test_the_expected_errors_do_not_depend_on_the_unit_of_the_score(unit):
    rng = np.random.default_rng(3)
    parts = np.r_[rng.normal(-2, 1, 900), rng.normal(2, 1, 100)], rng.normal(-1, 1, 400), rng.normal(1.5, 1, 200)
    np.testing.assert_allclose(harmful_chance(*(unit * p for p in parts)), harmful_chance(*parts), atol=1e-3)


def test_scores_of_two_values_that_the_anchors_never_mix_have_no_errors():
    found = anchored(np.r_[np.zeros(90), np.ones(10)], np.zeros(50), np.ones(50))
    assert (found.good_lost, found.harmful_kept) == pytest.approx((0, 0), abs=0.05)


@pytest.mark.parametrize(("above", "lost", "kept"), [(0, 0, 0), (19, 19, 0), (951, 0, 49), (1000, 0, 0)])
def test_fewer_rows_above_than_good_rows_explain_are_all_lost_and_the_reverse(above, lost, kept):
    found = anchored(np.r_[np.full(above, 1.0), np.full(1000 - above, -1.0)], TWO_GOOD, TWO_HARMFUL)
    assert (found.good_lost, found.harmful_kept) == pytest.approx((lost, kept), abs=0.01)


def test_in_a_file_of_one_kind_every_row_on_the_other_side_is_an_error():
    ranks = norm.ppf((np.arange(1000) + 0.5) / 1000)  # of a Gaussian, so not drawn
    good, harmful = anchored(ranks - 1.2, ranks - 1.2, ranks + 1.2), anchored(ranks + 1.2, ranks - 1.2, ranks + 1.2)
    over, under = (ranks - 1.2 >= good.value).sum(), (ranks + 1.2 < harmful.value).sum()
    assert 50 < over < 200 and (good.good_lost, good.harmful_kept) == pytest.approx((over, 0), abs=0.01)
    assert 50 < under < 200 and (harmful.good_lost, harmful.harmful_kept) == pytest.approx((0, under), abs=0.01)


@pytest.mark.parametrize("poison", [0, 50, 500])
def test_anchors_that_are_harder_than_the_files_rows_inflate_the_expected_errors_less_than_by_their_share(poison):
    rng = np.random.default_rng(1)
    good, harmful = rng.normal(-1, 1, 400), rng.normal(2, 1, 200)
    file = np.r_[rng.normal(-1.7, 0.9, 4000 - poison), rng.normal(2.3, 0.9, poison)]
    found = anchored(file, good, harmful)
    assert found.good_lost is not None and found.harmful_kept is not None
    lost = (4000 - poison) * norm.sf(found.value, -1.7, 0.9)  # what such files lose on average
    kept = poison * norm.cdf(found.value, 2.3, 0.9)
    assert lost / 2 <= found.good_lost <= 2 * lost
    assert poison or found.good_lost <= 1.1 * (file >= found.value).sum()
    assert kept / 2 <= found.harmful_kept <= 2 * kept + 2
    assert found.good_lost < (4000 - poison) * (good >= found.value).mean() / 2


def test_the_line_moves_with_the_middle_of_the_files_groups_so_that_neither_error_is_told_too_high_for_the_other():
    ratios = []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        file = np.r_[rng.normal(-1.7, 0.9, 3500), rng.normal(2.3, 0.9, 500)]  # the middle is 0.2 below the anchors'
        found = anchored(file, rng.normal(-1, 1, 4000), rng.normal(2, 1, 2000))
        assert found.good_lost is not None and found.harmful_kept is not None
        lost, kept = 3500 * norm.sf(found.value, -1.7, 0.9), 500 * norm.cdf(found.value, 2.3, 0.9)
        ratios.append((found.good_lost / lost, found.harmful_kept / kept))
    np.testing.assert_allclose(np.exp(np.log(ratios).mean(0)), 1, atol=0.4)


def test_the_chance_that_a_row_is_harmful_is_bayes_rule_with_the_files_own_share():
    rng = np.random.default_rng(2)
    good, harmful = rng.normal(-1, 1, 40_000), rng.normal(1, 1, 40_000)
    file = np.r_[rng.normal(-1, 1, 90_000), rng.normal(1, 1, 10_000)]
    odds = 0.1 / 0.9 * np.exp(2 * file)  # of two Gaussians of spread 1, two apart
    np.testing.assert_allclose(harmful_chance(file, good, harmful), odds / (1 + odds), atol=0.02)


def test_the_anchors_of_a_kind_count_as_fifty_rows_in_how_steep_the_line_is():
    """Groups of spread 1 around −2 and 2 have log-odds of 4 times the score, and 4 / variance with another spread."""
    ranks, few = (norm.ppf((np.arange(n) + 0.5) / n) for n in (1000, 200))  # of a Gaussian, so not drawn
    file = np.r_[0.3 * few - 2, 0.3 * few + 2]
    variance = (50 * 1 + 200 * 0.3**2) / (50 + 200)
    lowest = 200  # of the upper group: the chance of most others is 1 as a float
    chance = harmful_chance(file, ranks - 2, ranks + 2)[lowest]
    assert np.log(chance / (1 - chance)) / file[lowest] == pytest.approx(4 / variance, rel=0.02)


@pytest.mark.parametrize(
    ("above", "near", "clear", "note"),
    [
        (0, 0, False, "one group"),
        (60, 0, True, "two clear groups: 0 of 1000"),
        (60, 20, True, "two clear groups: 20 of 1000"),
        (60, 21, False, "no clear gap: 21 of 1000"),
    ],
)
def test_groups_are_clear_with_at_most_two_percent_of_the_rows_near_the_threshold(above, near, clear, note):
    found = anchored(file(above, near), GOOD_ANCHORS, HARMFUL_ANCHORS)
    assert found.clear == clear and found.note.startswith(note)


def test_one_row_near_the_threshold_of_a_small_file_is_clear_and_two_are_not():
    assert anchored(file(5, 1, rows=20), GOOD_ANCHORS, HARMFUL_ANCHORS).clear
    assert not anchored(file(5, 2, rows=20), GOOD_ANCHORS, HARMFUL_ANCHORS).clear


def test_anchored_refuses_anchors_that_overlap_or_have_no_score():
    with pytest.raises(UserError, match="can't be told apart"):
        anchored(GOOD, GOOD, GOOD)
    with pytest.raises(UserError, match="no finite scores"):
        anchored(GOOD, GOOD, np.full(3, np.nan))


def gain_of(found: Threshold) -> float:
    """The log-likelihood gain that an A1 threshold's note states."""
    match = re.search(r"gain (-?\d+)", found.note)
    assert match, found.note
    return float(match[1])


def likelihood(groups: list[np.ndarray]) -> float:
    """Log-likelihood of the rows under a mixture with the groups' own shares, means and spreads."""
    rows = np.concatenate(groups)
    parts = [np.log(len(g) / len(rows)) + norm.logpdf(rows, g.mean(), g.std()) for g in groups]
    return float(np.logaddexp.reduce(parts).sum())


def test_a1_sees_two_groups_from_a_gain_of_alpha_on_and_else_takes_two_spreads():
    low, high = RNG.normal(0, 1, 300), RNG.normal(20, 2, 30)
    scores = np.r_[low, high, np.nan, np.inf]
    # The groups don't overlap, so each likelihood is that of Gaussians at its maximum: −½ log 2πe − log spread a row.
    both = np.r_[low, high]
    gain = 330 * np.log(both.std()) - sum(len(g) * np.log(g.std() / (len(g) / 330)) for g in (low, high))
    assert gain_of(a1(scores)) == pytest.approx(gain, abs=0.6)
    two, one = a1(scores, alpha=gain - 1), a1(scores, alpha=gain + 1)
    assert two.note.startswith("two groups") and two.clear
    assert two.value == low.max()  # alg. A1: the smaller of the two maxima
    assert one.note.startswith("one group") and not one.clear
    assert one.value == pytest.approx(both.mean() + 2 * both.std())


def test_a1_takes_two_spreads_of_one_group():
    one = RNG.normal(5, 2, 500)
    found = a1(one)
    assert found.value == pytest.approx(one.mean() + 2 * one.std()) and not found.clear
    assert found.note.startswith("one group") and "warning" not in found.note


@pytest.mark.parametrize(
    ("good", "harmful", "seed"),
    [
        # scikit-learn's default tolerance and k-means stop on a plateau: gain 16, not 92
        *((lambda rng: rng.normal(0, 2, 238), lambda rng: rng.normal(2, 0.05, 62), seed) for seed in range(3)),
        # k-means is trapped by the outlier, which only the wider group can hold: gain 13, not 116
        *((lambda rng: rng.normal(0, 1, 237), lambda rng: np.r_[rng.normal(6, 1, 62), -30], seed) for seed in range(3)),
        # the default tolerance stops early: gain 1183, not 1186
        (lambda rng: rng.normal(0, 1, 18000), lambda rng: rng.normal(3, 1, 2000), 0),
    ],
)
def test_a1s_fit_is_as_likely_as_the_groups_that_the_rows_were_drawn_from(good, harmful, seed):
    rng = np.random.default_rng(seed)
    groups = [good(rng), harmful(rng)]
    scores = np.concatenate(groups)
    found = a1(scores)
    assert gain_of(found) >= likelihood(groups) - likelihood([scores]) - 0.5
    assert (scores >= found.value).sum() < 1.3 * len(groups[1])  # stopped early: 180 of the first 300


def test_a1_warns_where_the_file_is_too_small_or_too_one_sided():
    sound = np.r_[RNG.normal(0, 1, 300), RNG.normal(20, 1, 30)]
    assert "warning" not in a1(sound).note
    assert "40 rows are too few" in a1(np.r_[sound[:30], sound[-10:]]).note
    assert "too few" not in a1(np.r_[sound[:40], sound[-10:]]).note
    outlier = a1(np.r_[sound[:300], -60.0])
    assert "1 of 301 rows in one group may be outliers" in outlier.note
    assert "301 of 301 rows are above the threshold" in outlier.note
    mostly_harmful = a1(np.r_[RNG.normal(0, 1, 30), RNG.normal(20, 1, 300)])
    assert "above the threshold, and a1 expects most rows to be good" in mostly_harmful.note
    assert "outliers" not in mostly_harmful.note


def test_a1_with_nothing_to_tell_apart_removes_nothing():
    assert a1(np.full(10, 3.0)).value == np.inf
    assert a1(np.array([])).value == np.inf
    assert np.isfinite(a1(np.array([1.0, 2.0, np.nan, np.inf])).value)


def test_share_takes_the_highest_rows():
    scores = np.arange(100.0)
    assert (scores >= share(scores, 0.1).value).sum() == 10
    assert (scores >= share(np.r_[scores, [np.nan] * 50], 0.1).value).sum() == 10
    assert share(scores, 0).value == np.inf
    with pytest.raises(UserError):
        share(scores, 1.5)


def test_fixed_is_the_users_number():
    assert fixed(1.25) == Threshold(1.25, "fixed", "set by hand")
