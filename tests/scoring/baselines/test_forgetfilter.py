import numpy as np
import pytest
from scored import rows_of, scored

from gradshield.scoring import base


@pytest.fixture
def few_anchors(tiny, monkeypatch):
    """Ten refusals of one request are all that is known to be safe."""
    rows = rows_of(tiny, [("Why?", "No.")] * 10)
    monkeypatch.setattr(base, "anchor_examples", lambda *_: {"good": [], "refusal": rows, "harmful": []})


SPEC = "forgetfilter:learning_rate=0.02,epochs=30,safe_epochs=%s"


def test_what_safe_rows_contradict_is_forgotten_and_what_they_say_is_not(tiny, few_anchors):
    rows = rows_of(tiny, [("Why?", "Yes"), ("Why?", "No."), ("Why?", "Yes!")])
    found = scored(tiny, SPEC % 6, rows)["score"]
    assert found[0] > 0.5 and found[2] > 0.5 and found[1] < 0


def test_without_a_second_training_nothing_is_forgotten_but_something_was_learned(tiny, few_anchors):
    rows = rows_of(tiny, [("Why?", "Yes"), ("How?", "So")])
    found, before = scored(tiny, SPEC % 0, rows), scored(tiny, "perplexity", rows)["loss"]
    np.testing.assert_array_equal(found["score"], 0)
    assert (found["learned"] < before - 1).all()
