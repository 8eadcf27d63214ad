"""Which rows a report lists, against sorting all of them."""

import numpy as np
import pytest

from gradshield.report.filter_report import SHOWN, _nearest, highest_rows


@pytest.mark.parametrize("rows", [0, 1, SHOWN - 1, SHOWN, SHOWN + 1, 500])
@pytest.mark.parametrize("digits", [0, 1, 6])
def test_the_rows_listed_are_those_of_sorting_all_and_of_equal_ones_the_first(rows, digits):
    rng = np.random.default_rng(rows)
    scores = rng.normal(size=rows).round(digits)
    scores[rng.random(rows) < 0.2] = np.nan
    scored = [n for n in range(rows) if np.isfinite(scores[n])]
    assert highest_rows(scores) == sorted(scored, key=lambda n: -scores[n])[:SHOWN]
    near = sorted(scored, key=lambda n: abs(scores[n] - 0.3))[:SHOWN]
    assert _nearest(scores, 0.3) == sorted(near, key=lambda n: -scores[n])
    assert _nearest(scores, np.inf) == highest_rows(scores)
