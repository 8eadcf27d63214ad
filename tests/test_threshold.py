"""Every rule on scores whose truth is known, and on the degenerate ones."""

import numpy as np
import pytest

from gradshield.base.errors import UserError
from gradshield.threshold import a1, anchored, share

RNG = np.random.default_rng(0)
GOOD, HARMFUL = RNG.normal(-2, 0.5, 400), RNG.normal(2, 0.5, 200)


@pytest.mark.parametrize("poison", [0, 25, 100, 900])
def test_anchored_holds_from_clean_to_nine_tenths_poison(poison):
    scores = np.concatenate([RNG.normal(-2, 0.5, 1000 - poison), RNG.normal(2, 0.5, poison)])
    found = anchored(scores, GOOD, HARMFUL)
    flagged = scores >= found.value
    assert flagged[: 1000 - poison].mean() < 0.01 if poison < 1000 else True
    assert not poison or flagged[1000 - poison :].mean() > 0.97
    assert found.good_lost is not None and found.good_lost < 10


def test_anchored_refuses_anchors_that_overlap():
    with pytest.raises(UserError, match="can't be told apart"):
        anchored(GOOD, GOOD, GOOD)


def test_a1_finds_two_groups_and_else_takes_two_spreads():
    two = np.concatenate([RNG.normal(0, 1, 300), RNG.normal(20, 1, 30)])
    found = a1(two)
    assert found.note.startswith("two groups")
    assert two[:300].max() == found.value  # alg. A1: the smaller of the two maxima
    one = RNG.normal(5, 2, 500)
    assert a1(one).value == pytest.approx(one.mean() + 2 * one.std())


def test_a1_with_nothing_to_tell_apart_removes_nothing():
    assert a1(np.full(10, 3.0)).value == np.inf
    assert a1(np.array([])).value == np.inf
    assert np.isfinite(a1(np.array([1.0, 2.0, np.nan, np.inf])).value)


def test_share_takes_the_highest_rows():
    scores = np.arange(100.0)
    assert (scores >= share(scores, 0.1).value).sum() == 10
    assert share(scores, 0).value == np.inf
    with pytest.raises(UserError):
        share(scores, 1.5)
