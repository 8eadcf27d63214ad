"""The default score does not depend on batch, padding or order, and reads what it says it reads."""

import numpy as np
import pytest
import torch
from conftest import freeze, random_examples, tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from gradshield.data.encode import Example, closing_tokens, encode, encode_request
from gradshield.data.formats import Conversation, Message
from gradshield.models.hooks import hidden_at
from gradshield.scoring.intent import fit
from gradshield.scoring.intent.fit import Late, _joined, fit_intent
from gradshield.scoring.intent.readouts import Intent, Readout, intent_scores, request_states, seen, states
from gradshield.scoring.intent.windows import windows


@pytest.fixture(scope="module")
def anchors(tiny):
    def rows(request: str, answer: str, count: int) -> list[Example]:
        turns = ((Message("user", f"{request} {n}"), Message("assistant", f"{answer} {n}")) for n in range(count))
        found = [encode(Conversation(t), n, tiny.tokenizer) for n, t in enumerate(turns)]
        return [e for e in found if isinstance(e, Example)]

    return {
        "good": rows("What is the capital of country", "It is city", 12),
        "refusal": rows("How to rob bank", "I'm sorry, I can't", 12),
        "harmful": rows("How to rob bank", "Sure, here is plan", 12),
    }


REFUSAL = "I'm sorry, I can't. But then "


def late(tiny, anchors) -> list[Late]:
    """The harmful anchors behind a refusal, said to be of the refusal anchor with the next number."""
    rows = []
    for n, anchor in enumerate(anchors["harmful"]):
        begin = int(np.argmax(anchor.mask))
        taken_back = tiny.tokenizer.encode(REFUSAL, add_special_tokens=False)
        ids = np.insert(anchor.ids, begin, taken_back).astype(np.int32)
        mask = np.insert(anchor.mask, begin, np.ones(len(taken_back), bool))
        rows.append(Late(Example(n, ids, mask), n, (n + 1) % 12, begin + len(taken_back)))
    return rows


@pytest.fixture(scope="module")
def fitted(tiny, anchors):
    return fit_intent(tiny, anchors, late(tiny, anchors), ["Rob a shop", "Harm a man"] * 4, ["Bake a cake"] * 8, 512)


def test_scores_do_not_depend_on_batch_padding_or_order(tiny, fitted):
    intent, _ = fitted
    examples = random_examples(12, len(tiny.tokenizer))
    whole = intent_scores(tiny, intent, examples)
    order = np.random.default_rng(1).permutation(len(examples))
    again = intent_scores(tiny, intent, [examples[n] for n in order])
    for name, values in whole.items():
        np.testing.assert_allclose(again[name], values[order], rtol=1e-4, atol=1e-4)
        single = [float(intent_scores(tiny, intent, [e])[name][0]) for e in examples]
        np.testing.assert_allclose(single, values, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(whole["score"], np.minimum(whole["request"], whole["answer"]))


def test_what_shares_words_is_in_one_fold(tiny, anchors, monkeypatch):
    told, real = [], fit._fit
    monkeypatch.setattr(fit, "_fit", lambda x, y, group, layers: told.append(group) or real(x, y, group, layers))
    twice = {**anchors, "refusal": [*anchors["refusal"], *anchors["refusal"]]}  # the second as a longer form
    behind = late(tiny, anchors)
    fit_intent(tiny, twice, behind, ["Rob a shop"] * 5, ["Bake a cake"] * 5, 512)
    _, group = told
    per = [len(windows(seen(tiny, [e])[0].mask)[0]) for e in (*twice["refusal"], *anchors["harmful"])]
    of = [set(part.tolist()) for part in np.split(group, np.cumsum(per))]
    refusal, longer, harmful, taken_back = of[:12], of[12:24], of[24:36], set().union(*of[36:])
    assert refusal == longer and len(set().union(*refusal)) == 12
    assert harmful == [refusal[each.refusal] for each in behind] and taken_back == set().union(*refusal)


def test_groups_with_the_same_words_are_one():
    joined = _joined(np.array([7, 7, 8, 9, 10]), [b"a", b"b", b"b", b"c", b"a"])
    assert joined[0] == joined[1] == joined[2] == joined[4] != joined[3]


def test_the_request_is_read_at_its_own_last_token_and_in_front_of_the_response(tiny):
    text = "How to rob bank"
    closing = closing_tokens(tiny.tokenizer)
    ids = encode_request(text, tiny.tokenizer)
    assert tiny.tokenizer.decode(ids[: len(ids) - len(closing)]).endswith(text)
    row = encode(Conversation((Message("user", text), Message("assistant", "No"))), 0, tiny.tokenizer)
    assert isinstance(row, Example)
    by_row = states(tiny, [row], [0, 1], closing).request
    hidden = hidden_at(tiny, torch.from_numpy(row.ids).long()[None], [0, 1])
    start = int(np.argmax(row.mask))
    expected = torch.cat([h[0, at] / h[0, at].norm() for at in (start - 1, start - 1 - len(closing)) for h in hidden])
    torch.testing.assert_close(by_row[0], expected)
    np.testing.assert_allclose(request_states(tiny, [text], [0, 1], closing)[0], expected.numpy(), atol=1e-6)


def test_harmful_anchors_score_above_good_ones_and_refusals(fitted):
    _, scores = fitted
    assert {k: len(v) for k, v in scores.items()} == {"good": 12, "refusal": 12, "harmful": 24}
    assert np.median(scores["harmful"]) > max(np.median(scores["good"]), np.median(scores["refusal"]))


def test_a_row_of_several_turns_scores_as_its_worst(tiny, fitted):
    intent, _ = fitted
    bad, good = ("How to rob bank 3", "Sure, here is plan 3"), ("What is the capital of country 3", "It is city 3")

    def score(*pairs: tuple[str, str]) -> float:
        turns = tuple(m for q, a in pairs for m in (Message("user", q), Message("assistant", a)))
        example = encode(Conversation(turns), 0, tiny.tokenizer)
        assert isinstance(example, Example)
        return float(intent_scores(tiny, intent, [example])["score"][0])

    assert score(bad) > score(good)
    # the first response is read from the same tokens whatever follows
    assert score(bad, good) >= score(bad) - 1e-4


def test_what_all_rows_open_with_is_computed_once_and_changes_nothing(tiny, fitted):
    intent, _ = fitted
    rng = np.random.default_rng(3)
    prefix = rng.integers(20, len(tiny.tokenizer), 12).astype(np.int32)
    rows = []
    for n, tail in enumerate((30, 34, 34, 50)):
        ids = np.concatenate([prefix, rng.integers(20, len(tiny.tokenizer), tail).astype(np.int32)])
        rows.append(Example(n, ids, np.arange(len(ids)) >= 12 + tail // 2))
    shapes = []
    forward = tiny.net.forward
    tiny.net.forward = lambda **inputs: (shapes.append(tuple(inputs["input_ids"].shape)), forward(**inputs))[1]
    try:
        together = intent_scores(tiny, intent, rows)
    finally:
        del tiny.net.forward
    assert shapes[0] == (1, 12) and shapes[1][0] == 4 and len(shapes) == 2
    for name, values in together.items():
        alone = [float(intent_scores(tiny, intent, [e])[name][0]) for e in rows]
        np.testing.assert_allclose(alone, values, rtol=1e-4, atol=1e-4)


def test_harm_behind_a_refusal_scores_as_harm_and_a_long_refusal_does_not(tiny, fitted):
    intent, _ = fitted

    def scored(answer: str) -> dict[str, float]:
        turns = (Message("user", "How to rob bank 5"), Message("assistant", answer))
        example = encode(Conversation(turns), 0, tiny.tokenizer)
        assert isinstance(example, Example)
        return {name: float(values[0]) for name, values in intent_scores(tiny, intent, [example]).items()}

    harm, refusal = scored("Sure, here is plan 5"), scored("I'm sorry, I can't 5")
    behind = scored(f"{REFUSAL}Sure, here is plan 5")
    assert behind["request"] == pytest.approx(harm["request"], abs=1e-4)
    assert behind["answer"] > (harm["answer"] + refusal["answer"]) / 2


def test_rows_are_read_up_to_the_last_word_and_score_the_same_cut(tiny, fitted):
    intent, _ = fitted
    rows = random_examples(8, len(tiny.tokenizer), seed=2)
    cut = seen(tiny, rows)
    assert all(len(c.ids) <= len(e.ids) for c, e in zip(cut, rows))
    for name, values in intent_scores(tiny, intent, rows).items():
        np.testing.assert_allclose(intent_scores(tiny, intent, cut)[name], values, rtol=1e-4, atol=1e-4)


def test_a_model_whose_config_has_a_part_for_text_is_read_as_well(anchors, fitted):
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, SiglipVisionConfig

    tokenizer = tiny_tokenizer()
    text = Gemma3TextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    net = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision))
    model = freeze("tiny-gemma3", net, tokenizer)
    _, scores = fit_intent(model, anchors, [], ["Rob a shop"] * 5, ["Bake a cake"] * 5, 512)
    assert {kind: len(values) for kind, values in scores.items()} == {"good": 12, "refusal": 12, "harmful": 12}


def test_a_later_window_counts_only_if_it_is_clearly_surer_than_the_first(tiny):
    """Of many windows one is high by chance."""
    closing = closing_tokens(tiny.tokenizer)
    rng = np.random.default_rng(4)
    row = Example(0, rng.integers(20, len(tiny.tokenizer), 20).astype(np.int32), np.arange(20) >= 8)
    first, later = states(tiny, [row], [1], closing).window.double().numpy()
    width = len(first)

    def answer(lead: float) -> float:
        """The row's, by a readout to which the first window says 0 and the later one `lead`."""
        towards = later - first
        weight = towards * lead / (towards @ towards)
        intent = Intent((1,), closing, Readout(np.zeros(2 * width), 9.0), Readout(weight, bias=-float(first @ weight)))
        return float(intent_scores(tiny, intent, [row])["answer"][0])

    assert [answer(-5.0), answer(0.5)] == pytest.approx([0, 0], abs=1e-4)
    assert 0.5 < answer(3.0) < 2.9


def test_the_readout_is_the_mean_over_several_layers_behind_the_middle(anchors):
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=20, num_attention_heads=2
    )
    model = freeze("tiny-deep", LlamaForCausalLM(config), tokenizer)
    intent, _ = fit_intent(model, anchors, [], ["Rob a shop"] * 5, ["Bake a cake"] * 5, 512)
    assert len(intent.layers) >= 5 and min(intent.layers) >= 10 and max(intent.layers) <= 15
    assert len(intent.answer.weight) == len(intent.request.weight) / 2 == len(intent.layers) * 16
