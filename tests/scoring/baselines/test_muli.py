import numpy as np
import torch
from scipy.optimize import minimize
from scored import rows_of, scored

from gradshield.scoring.baselines.muli import features, sparse_logistic


def test_the_optimum_is_the_one_that_a_general_solver_finds_and_is_sparse():
    torch.manual_seed(0)
    x = torch.randn(80, 5) * torch.tensor([1.0, 3, 1, 1, 1]) + 2
    y = (x[:, 1] - 2 + 0.5 * torch.randn(80) > 1).float()
    weight, bias = sparse_logistic(x, y, 0.05)
    z = ((x - x.mean(0)) / x.std(0)).double().numpy()
    sign, balance = 2 * y.numpy() - 1, np.where(y == 1, float((1 - y).sum() / y.sum()), 1.0) / 80

    def objective(both):  # both parts of w = u − v, b = c − d, all ≥ 0
        w = both[:6] - both[6:]
        return (balance * np.logaddexp(0, -sign * (z @ w[:5] + w[5]))).sum() + 0.05 * both.sum()

    best = minimize(objective, np.full(12, 0.1), bounds=[(0, None)] * 12, method="L-BFGS-B", options={"maxiter": 5000})
    wanted = best.x[:6] - best.x[6:]
    np.testing.assert_allclose(weight * x.std(0), wanted[:5], atol=5e-3)
    np.testing.assert_allclose(x @ weight + bias, z @ wanted[:5] + wanted[5], atol=2e-2)
    assert (weight == 0).sum() >= 3 and weight[1] > 0


def test_a_token_that_is_certain_or_impossible_is_finite():
    found = features(torch.tensor([[0.0, 1e4, -1e4]]))
    assert found.isfinite().all() and found[0, 1] > 30 and found[0, 2] < -30


def test_it_reads_the_request_only(tiny):
    pairs = [("Bake a cake", "Sure"), ("Bake a cake", "I can't help with that"), ("Why?", "Sure")]
    found = scored(tiny, "muli", rows_of(tiny, pairs))["score"]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)
    assert abs(found[0] - found[2]) > 1e-3
