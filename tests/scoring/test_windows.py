"""Windows lie over every response, to its last word and no further."""

from itertools import pairwise

import numpy as np

from gradshield.data.encode import Example
from gradshield.scoring.intent.windows import STRIDE, WINDOW, response_starts, spoken, windows

IDS = np.arange(40, dtype=np.int32)


def mask(*runs):
    result = np.zeros(40, dtype=bool)
    for start, stop in runs:
        result[start:stop] = True
    return result


def test_end_tokens_are_taken_off_every_response_and_the_rest_is_cut():
    cut = spoken(Example(0, IDS, mask((3, 6), (9, 20))), np.array([5, 12, 18, 19]))
    assert np.flatnonzero(cut.mask).tolist() == [3, 4, *range(9, 18)]
    assert len(cut.ids) == 18 and response_starts(cut.mask).tolist() == [3, 9]
    again = spoken(cut, np.array([5, 12, 18, 19]))
    assert np.array_equal(again.mask, cut.mask) and np.array_equal(again.ids, cut.ids)


def test_an_end_token_stays_when_nothing_else_is_left():
    cut = spoken(Example(0, IDS, mask((38, 40))), np.array([38, 39]))
    assert np.flatnonzero(cut.mask).tolist() == [38, 39]


def test_windows_cover_every_token_of_a_response_and_none_beside_it():
    for length in range(1, 30):
        (found,) = windows(mask((4, 4 + length)))
        assert sorted({t for start, stop in found for t in range(start, stop)}) == list(range(4, 4 + length))
        assert {stop - start for start, stop in found} == {min(WINDOW, length)} and len(set(found)) == len(found)
        starts = [start for start, _ in found]
        assert starts == sorted(starts) and all(b - a <= STRIDE for a, b in pairwise(starts))


def test_each_response_has_windows_of_its_own():
    assert windows(mask((3, 6), (9, 20))) == [[(3, 6)], [(9, 17), (12, 20)]]
