import numpy as np
from conftest import random_examples
from scipy.stats import kstest, spearmanr
from scored import scored


def test_scores_are_uniform_and_each_seed_is_another_draw(tiny):
    rows = random_examples(400, 200)
    one, other = (scored(tiny, f"random:seed={seed}", rows)["score"] for seed in (0, 1))
    assert kstest(one, "uniform").pvalue > 0.01 and kstest(other, "uniform").pvalue > 0.01
    assert abs(spearmanr(one, other).statistic) < 0.2
    np.testing.assert_array_equal(one, scored(tiny, "random", rows[::-1])["score"][::-1])
