import numpy as np
import pytest
from conftest import random_examples
from scored import CHECK, rows_of, scored

from gradshield.base.errors import UserError
from gradshield.base.settings import FilterSettings
from gradshield.scoring import base
from gradshield.scoring.baselines import seal
from gradshield.scoring.reference import make_reference


@pytest.fixture
def safe_refusals(tiny, monkeypatch):
    rows = rows_of(tiny, [("Why?", "No.")] * 8)
    monkeypatch.setattr(base, "anchor_examples", lambda *_: {"good": rows[:1], "refusal": rows, "harmful": rows})


def test_with_the_model_held_the_first_step_weighs_rows_down_that_have_more_than_the_mean_loss(tiny, safe_refusals):
    rows = random_examples(8, 200)
    loss = scored(tiny, "perplexity", rows)["loss"]
    found = scored(tiny, "seal:learning_rate=0,epochs=1,selector_rate=0.05", rows)["score"]
    # ∂/∂p_j of Σ_i softmax(p)_i L_i is softmax_j (L_j − mean L), and Adam's first step is its sign times the rate.
    np.testing.assert_allclose(found, -0.1 + 0.05 * np.sign(loss - loss.mean()), atol=1e-4)


def test_a_row_that_contradicts_the_safe_ones_is_weighed_down_below_one_that_agrees(tiny, safe_refusals):
    rows = rows_of(tiny, [("Why?", "Yes"), ("Why?", "No."), ("Why?", "Yes!")])
    found = scored(tiny, "seal:learning_rate=0.02,epochs=40", rows)["score"]
    assert found[1] < min(found[0], found[2])


def test_the_safe_rows_have_all_the_weight_in_the_first_epoch_and_a_little_less_in_each_later_one(
    tiny, safe_refusals, monkeypatch
):
    real, weights = seal.backward, []

    def watched(model, adapter, rows, weight, tokens):
        weights.append(np.array(weight))
        return real(model, adapter, rows, weight, tokens)

    monkeypatch.setattr(seal, "backward", watched)
    scored(tiny, "seal:epochs=4,learning_rate=0", random_examples(4, 200))  # a step an epoch
    safe, own = weights[::2], weights[1::2]  # the safe rows come first
    np.testing.assert_allclose([w.sum() for w in safe], [1, 0.97, 0.94, 0.91])
    np.testing.assert_allclose([w.sum() for w in own], [0, 0.03, 0.06, 0.09], atol=1e-6)


def test_the_selector_s_first_step_is_its_rate(tiny, safe_refusals):
    found = scored(tiny, "seal:epochs=1,learning_rate=0", random_examples(8, 200))["score"]
    np.testing.assert_allclose(np.abs(found + 0.1), 0.005, atol=1e-4)


def test_a_row_of_another_file_is_set_aside_and_anchors_are_no_scale(tiny, safe_refusals):
    rows = random_examples(3, 200)
    reference = make_reference(tiny, CHECK, FilterSettings(scorer="seal", threshold="fixed"), rows)
    found = reference.scorer([*random_examples(1, 200, seed=9), rows[1]])
    assert list(found.reasons) == [0] and np.isnan(found["score"][0]) and np.isfinite(found["score"][1])
    with pytest.raises(UserError, match=r"--scorer seal: no good anchor has a score .* --threshold share"):
        make_reference(tiny, CHECK, FilterSettings(scorer="seal"), rows)
