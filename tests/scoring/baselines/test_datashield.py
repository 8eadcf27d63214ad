import numpy as np
import pytest
from conftest import random_examples
from scored import scored

from gradshield.scoring.anchors import anchor_examples
from gradshield.scoring.baselines.datashield import compliance
from gradshield.scoring.states import read_states


def test_the_direction_runs_from_refusing_to_complying_and_its_score_is_the_between_class_share():
    rng = np.random.default_rng(0)
    axis = np.eye(6)[2]
    comply, refuse = (rng.normal(size=(40, 6)) + sign * 30 * axis for sign in (1, -1))
    direction, score = compliance(comply, refuse)
    assert direction @ axis > 0.99 and score > 0.95
    # Along one dimension, it is 1 − within / total scatter.
    one, other = rng.normal(size=(50, 1)) + 1, rng.normal(size=(50, 1)) - 1
    both = np.concatenate([one, other])
    within = sum(((x - x.mean()) ** 2).sum() for x in (one, other))
    assert compliance(one, other)[1] == pytest.approx(1 - within / ((both - both.mean()) ** 2).sum())


def test_it_is_the_shift_from_the_prompt_to_the_answer_along_it(tiny):
    rows, anchors = random_examples(4, 200), anchor_examples(tiny)
    comply, refuse = (
        read_states(tiny, anchors[kind][:200:2], [1], "response", 400)[0].mean(0) for kind in ("harmful", "refusal")
    )
    direction = (comply - refuse) / np.linalg.norm(comply - refuse)
    answer, prompt = (read_states(tiny, rows, [1], place, 400)[0] @ direction for place in ("response", "prompt"))
    np.testing.assert_allclose(scored(tiny, "datashield:layer=1", rows)["score"], answer - prompt, atol=1e-3)
