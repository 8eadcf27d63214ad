from dataclasses import replace

import numpy as np
import pytest
from conftest import freeze, tiny_net, tiny_tokenizer
from scored import rows_of, scored

from gradshield.scoring.anchors import anchor_examples
from gradshield.scoring.baselines.datashield import compliance
from gradshield.scoring.states import read_states

ROWS = [("Why?", "Because it rains."), ("Say it.", "No"), ("List two\nthings", "- one\n- two")]


def words(model, example):
    """The example with its answer alone as the response: neither the end of the turn nor white space at the end."""
    end = int(np.flatnonzero(example.ids == model.tokenizer.eos_token_id)[-1])
    mask = example.mask.copy()
    assert mask[end]
    while mask[end] and not model.tokenizer.decode(example.ids[end], skip_special_tokens=True).strip():
        end -= 1
    mask[end + 1 :] = False
    assert mask.any()
    return replace(example, mask=mask)


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


def test_it_is_the_shift_from_the_prompt_to_the_answer_s_words_along_it(tiny):
    rows, anchors = rows_of(tiny, ROWS), anchor_examples(tiny)
    answers = {kind: [words(tiny, e) for e in anchors[kind][:200:2]] for kind in ("harmful", "refusal")}
    comply, refuse = (read_states(tiny, part, [1], "response", 400)[0].mean(0) for part in answers.values())
    direction = (comply - refuse) / np.linalg.norm(comply - refuse)
    answer = read_states(tiny, [words(tiny, e) for e in rows], [1], "response", 400)[0] @ direction
    prompt = read_states(tiny, rows, [1], "prompt", 400)[0] @ direction
    found = scored(tiny, "datashield:layer=1", rows)
    np.testing.assert_allclose(found["score"], answer - prompt, atol=1e-4)
    np.testing.assert_allclose(found["prompt"], prompt, atol=1e-4)


def test_the_layer_is_the_one_that_tells_the_kinds_apart_at_the_last_token():
    tokenizer = tiny_tokenizer()
    model = freeze("tiny-5", tiny_net(tokenizer, seed=5), tokenizer)
    anchors = anchor_examples(model)
    kinds = [anchors[kind][:200:2] for kind in ("harmful", "refusal")]

    def best(place):
        comply, refuse = (read_states(model, part, range(3), place, 400) for part in kinds)
        return int(np.argmax([compliance(*pair)[1] for pair in zip(comply, refuse)]))

    assert (best("last"), best("response")) == (1, 2)
    rows = rows_of(model, ROWS)
    first, second = (scored(model, f"datashield:layer={layer}", rows)["score"] for layer in (1, 2))
    found = scored(model, "datashield", rows)["score"]
    np.testing.assert_array_equal(found, first)
    assert not np.allclose(found, second, atol=1e-3)
