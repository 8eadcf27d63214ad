"""The opening is the first tokens of every response, without the token that ends a turn."""

import numpy as np

from gradshield.data.encode import Example
from gradshield.scoring.windows import opening, response_starts

IDS = np.arange(20, dtype=np.int32)


def mask(*runs):
    result = np.zeros(20, dtype=bool)
    for start, stop in runs:
        result[start:stop] = True
    return result


def test_every_response_gives_its_opening_and_the_rest_is_cut():
    cut = opening(Example(0, IDS, mask((3, 6), (9, 20))), 4, frozenset({5}))
    assert np.flatnonzero(cut.mask).tolist() == [3, 4, 9, 10, 11, 12]
    assert len(cut.ids) == 13
    assert response_starts(cut.mask).tolist() == [3, 9]


def test_an_end_token_stays_when_nothing_else_is_left():
    cut = opening(Example(0, IDS, mask((19, 20))), 4, frozenset({19}))
    assert np.flatnonzero(cut.mask).tolist() == [19]


def test_an_end_token_inside_an_opening_does_not_part_it():
    whole = Example(0, IDS, mask((3, 12)))
    cut = opening(whole, 5, frozenset({4, 5, 7}))
    assert np.flatnonzero(cut.mask).tolist() == [3, 4, 5, 6] and response_starts(cut.mask).tolist() == [3]
    again = opening(cut, 5, frozenset({4, 5, 7}))
    assert np.array_equal(again.mask, cut.mask) and np.array_equal(again.ids, cut.ids)
