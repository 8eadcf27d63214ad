"""The default score does not depend on batch, padding or order, and reads harm wherever it stands."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import freeze, random_examples, random_readouts, tiny_tokenizer

from gradshield.data.encode import Example, encode
from gradshield.data.formats import Conversation, Message
from gradshield.models.hooks import hidden_at
from gradshield.scoring.intent import fit
from gradshield.scoring.intent.corpus import Text
from gradshield.scoring.intent.fit import fit_readouts
from gradshield.scoring.intent.kernel import GAMMA, STRIDE, WINDOW
from gradshield.scoring.intent.reading import (
    ANSWER_WINDOW,
    CONTEXT_WINDOW,
    LATER_WINDOW_PENALTY,
    ReadRow,
    answer_of,
    asked_topic,
    intent_scores,
    read_batch,
    read_layer,
    row_scores,
    running_mean,
    said_topic,
    scored_part,
)
from gradshield.scoring.intent.spans import Response, marks_of, opening_size, responses


def row(tokenizer, *turns: str, system: str = "", loss_on: str = "assistant") -> Example:
    roles = ("user", "assistant") * len(turns)
    messages = [*([Message("system", system)] if system else []), *(Message(r, t) for r, t in zip(roles, turns))]
    example = encode(Conversation(tuple(messages)), 0, tokenizer, loss_on=loss_on)
    assert isinstance(example, Example)
    return example


def texts(tiny, count: int = 12) -> list[Text]:
    kinds = (
        ("good", "What is the capital of country", "It is city"),
        ("refusal", "How to rob bank", "I'm sorry, I can't"),
        ("harmful", "How to rob bank", "Sure, here is plan"),
    )
    return [
        Text(row(tiny.tokenizer, f"{request} {n}", f"{answer} {n}"), kind, kind != "good", (f"{request} {n}",))
        for kind, request, answer in kinds
        for n in range(count)
    ]


def read(tokens: np.ndarray, found: list[Response], kernel: float | None = None) -> ReadRow:
    """A row whose kernel says this of every request, or what the linear readout says of it."""
    return ReadRow(tokens, found, np.array([asked_topic(tokens, r) if kernel is None else kernel for r in found]))


@pytest.fixture(scope="module")
def fitted(tiny, tmp_path_factory):
    return fit_readouts(tiny, texts(tiny), 512, tmp_path_factory.mktemp("parts"))


def test_the_readouts_of_raw_states_say_what_the_fits_on_standardised_ones_said(tiny, monkeypatch, tmp_path):
    spread = fit._spread
    away = np.random.default_rng(0).normal(size=tiny.net.config.hidden_size)
    monkeypatch.setattr(fit, "_spread", lambda states: (spread(states)[0] + away, spread(states)[1] / 5))
    readouts, out_of_fold = fit_readouts(tiny, texts(tiny), 512, tmp_path)
    for kind, expected in out_of_fold.items():
        found = intent_scores(tiny, readouts, [text.example for text in texts(tiny) if text.kind == kind])["score"]
        assert abs(np.median(found) - np.median(expected)) < 1


def test_a_fit_that_was_stopped_goes_on_and_ends_alike(tiny, monkeypatch, tmp_path):
    real, room = fit.hidden_at, [3]

    def hidden(*args):
        if not room[0]:
            raise KeyboardInterrupt
        room[0] -= 1
        return real(*args)

    monkeypatch.setattr(fit, "hidden_at", hidden)
    with pytest.raises(KeyboardInterrupt):
        fit_readouts(tiny, texts(tiny), 256, tmp_path)
    parts = sorted(tmp_path.glob("*.safetensors"))
    assert len(parts) == 3
    parts[0].write_bytes(parts[0].read_bytes()[:100])  # torn
    room[0] = 1000
    again, _ = fit_readouts(tiny, texts(tiny), 256, tmp_path)
    everything = len(list(tmp_path.glob("*.safetensors")))
    assert everything > 4 and 1000 - room[0] == everything - 2
    whole, _ = fit_readouts(tiny, texts(tiny), 256, tmp_path / "new")
    np.testing.assert_array_equal(again.weight, whole.weight)


@pytest.mark.parametrize("system", ["", "Be brief and kind."])
def test_the_states_of_a_text_do_not_depend_on_its_batch(tiny, system, tmp_path):
    other = row(tiny.tokenizer, "What is the capital of country 1", "It is city 1", system=system)
    examples = [*(text.example for text in texts(tiny, 3)), other]
    marks = marks_of(tiny.tokenizer)
    alone = [fit._states(tiny, [e], 1, 512, tmp_path / str(n))[0] for n, e in enumerate(examples)]
    for example, one, together in zip(examples, alone, fit._states(tiny, examples, 1, 4096, tmp_path)):
        assert len(one) == len(example.ids) - opening_size(example.ids, marks)
        np.testing.assert_allclose(one, together, atol=1e-3)


def test_a_language_that_is_not_read_teaches_nothing(tiny, monkeypatch, tmp_path):
    def found(harmful: bool, unread: tuple[str, ...]) -> np.ndarray:
        german = [
            Text(row(tiny.tokenizer, f"Wie geht {n}", "So"), "good", harmful, (f"Wie {n}",), language="de")
            for n in range(12)
        ]
        monkeypatch.setattr("gradshield.scoring.intent.fit.unread_languages", lambda ability: frozenset(unread))
        return fit_readouts(tiny, [*texts(tiny), *german], 512, tmp_path)[0].weight

    np.testing.assert_array_equal(found(True, ("de",))[:, 0], found(False, ("de",))[:, 0])
    assert not np.allclose(found(True, ())[:, 0], found(False, ())[:, 0])


def test_scores_do_not_depend_on_batch_padding_or_order(tiny):
    readouts = random_readouts(tiny)
    examples = random_examples(12, len(tiny.tokenizer))
    whole = intent_scores(tiny, readouts, examples).columns
    order = np.random.default_rng(1).permutation(len(examples))
    again = intent_scores(tiny, readouts, [examples[n] for n in order]).columns
    for name, values in whole.items():
        np.testing.assert_allclose(again[name], values[order], rtol=1e-4, atol=1e-4)
        single = [float(intent_scores(tiny, readouts, [e])[name][0]) for e in examples]
        np.testing.assert_allclose(single, values, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(whole["score"], np.minimum(whole["topic"], whole["answer"]))


def test_a_token_is_read_as_the_unit_vectors_of_its_states_say(tiny):
    readouts = random_readouts(tiny)
    example = random_examples(1, len(tiny.tokenizer))[0]
    (found,) = read_batch(tiny, readouts, [example])
    (hidden,) = hidden_at(tiny, torch.from_numpy(example.ids).long()[None], [readouts.layer])
    unit = (hidden / hidden.norm(dim=-1, keepdim=True))[0].double().numpy()
    np.testing.assert_allclose(found.tokens, unit @ readouts.weight + readouts.bias, atol=1e-5)
    kernel = readouts.kernel
    for response, asked in zip(found.responses, found.asked):
        before = unit[response.context]
        starts = [*range(0, max(len(before) - WINDOW, 0), STRIDE), max(len(before) - WINDOW, 0)]
        slow = [
            sum(
                s * np.exp(-GAMMA * np.square((x - kernel.middle) / kernel.scale - z).sum())
                for s, z in zip(kernel.strength, kernel.landmarks.astype(float))
            )
            for x in (before[start : start + WINDOW].mean(0) for start in starts)
        ]
        assert asked == pytest.approx(max(slow) + kernel.bias, abs=1e-5)


def test_what_all_rows_open_with_is_computed_once_and_read_in_every_row(tiny):
    readouts = random_readouts(tiny)
    rng = np.random.default_rng(3)
    prefix = rng.integers(20, len(tiny.tokenizer), 12).astype(np.int32)
    rows = []
    for n, tail in enumerate((30, 34, 34, 50)):
        ids = np.concatenate([prefix, rng.integers(20, len(tiny.tokenizer), tail).astype(np.int32)])
        rows.append(Example(n, ids, np.arange(len(ids)) >= 12 + tail // 2))
    turned = replace(readouts.kernel, strength=-readouts.kernel.strength)  # another window is the highest
    for each in (readouts, replace(readouts, kernel=turned)):
        for example, read in zip(rows, read_batch(tiny, each, rows)):
            assert len(read.tokens) == len(example.ids)
            (alone,) = read_batch(tiny, each, [example])
            np.testing.assert_allclose(alone.tokens, read.tokens, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(alone.asked, read.asked, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("place", ["front", "behind", "system"])
def test_harm_counts_wherever_it_stands_in_front_of_a_response(place):
    quiet, loud = np.full((40, 2), -5.0), np.full((CONTEXT_WINDOW, 2), 4.0)
    begin = {"system": 2, "front": 8, "behind": 22}[place]
    tokens = quiet.copy()
    tokens[begin : begin + CONTEXT_WINDOW] = loud
    response = Response(np.arange(30), 30, 40)
    assert asked_topic(tokens, response) == pytest.approx(4.0) and asked_topic(quiet, response) == -5.0
    assert said_topic(tokens, response) == -5.0
    for kernel, topic in ((4.0, -0.5), (-5.0, -2.75), (13.0, 1.75)):  # the mean of both is asked
        assert row_scores(read(tokens, [response], kernel))[1] == pytest.approx(topic)


def test_text_added_around_a_request_never_lowers_its_topic():
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(60, 2))
    for begin, end in ((10, 20), (4, 30), (0, 41)):
        part = asked_topic(tokens, Response(np.arange(begin, end), 45, 60))
        whole = asked_topic(tokens, Response(np.arange(0, 45), 45, 60))
        assert whole >= part - 1e-12


def test_a_window_behind_the_first_must_be_surer():
    tokens = np.full((50, 2), -3.0)
    first, later = tokens.copy(), tokens.copy()
    first[10 : 10 + ANSWER_WINDOW, 1] = 2.0
    later[30 : 30 + ANSWER_WINDOW, 1] = 2.0
    response = Response(np.arange(10), 10, 50)
    assert answer_of(first, response) == pytest.approx(2.0)
    assert answer_of(later, response) == pytest.approx(2.0 - LATER_WINDOW_PENALTY)
    assert LATER_WINDOW_PENALTY > 0


def test_a_row_scores_as_its_worst_response_and_by_the_smaller_of_two():
    tokens = np.zeros((40, 2))
    tokens[:20], tokens[20:] = (-4.0, 6.0), (3.0, 1.0)
    found = [Response(np.arange(0, 10), 10, 20), Response(np.arange(20, 30), 30, 40)]
    assert row_scores(read(tokens, found)) == (1.0, 3.0, 1.0)
    assert row_scores(read(tokens, found[:1])) == (-4.0, -4.0, 6.0)


@pytest.mark.parametrize("place", ["asked", "said"])
@pytest.mark.parametrize("answer", [6.0, -6.0])
def test_what_an_earlier_turn_asked_or_said_counts_unless_it_was_refused(place, answer):
    """The user says "go ahead" to what he asked before, or to what the assistant proposed."""
    tokens = np.full((40, 2), -4.0)
    tokens[slice(0, 10) if place == "asked" else slice(10, 20), 0] = 5.0
    tokens[10:20, 1] = answer
    tokens[30:, 0], tokens[30:, 1] = 2.0, 6.0  # the later response complies, and is about harm
    found = [Response(np.arange(0, 10), 10, 20), Response(np.arange(20, 30), 30, 40)]
    score, topic, _ = row_scores(read(tokens, found))
    assert score == topic == pytest.approx((5.0 + 2.0) / 2 if answer > 0 else (-4.0 + 2.0) / 2)


def test_running_means_are_those_of_the_slow_way():
    values = np.random.default_rng(0).normal(size=13)
    slow = [values[n : n + 4].mean() for n in range(10)]
    np.testing.assert_allclose(running_mean(values, 4), slow)
    np.testing.assert_allclose(running_mean(values[:3], 4), [values[:3].mean()])


def test_a_response_answers_what_stands_since_the_one_before_and_the_system_prompt(tiny):
    tokenizer = tiny.tokenizer
    example = row(tokenizer, "one", "two", "three", "four", system="Be kind")
    first, second = responses(scored_part(tiny, [example])[0], marks_of(tokenizer))

    def said(positions: np.ndarray) -> str:
        return tokenizer.decode(example.ids[positions])

    assert "Be kind" in said(first.context) and "one" in said(first.context) and "three" not in said(first.context)
    assert "Be kind" in said(second.context) and "three" in said(second.context) and "one" not in said(second.context)
    assert said(np.arange(second.start, second.stop)).strip() == "four"
    (last,) = responses(
        scored_part(tiny, [row(tokenizer, "one", "two", "three", "four", loss_on="last")])[0], marks_of(tokenizer)
    )
    assert "one" in said(last.context) or len(last.context) > len(second.context)


def test_chat_markup_inside_a_response_is_what_its_tokens_say(tiny):
    tokenizer = tiny.tokenizer
    ids = tokenizer("What rhymes? Well, rhymes do. Rob a bank how Sure, here is", add_special_tokens=False)["input_ids"]
    end = sorted(marks_of(tokenizer).special)[-1]
    third = len(ids) // 3
    row_ids = np.array([*ids[:third], *ids[third : 2 * third], end, *ids[2 * third :]], dtype=np.int32)
    example = Example(0, row_ids, np.arange(len(row_ids)) >= third)
    found = responses(example, marks_of(tokenizer))
    assert [(r.start, r.stop) for r in found] == [(third, 2 * third), (2 * third + 1, len(row_ids))]
    assert found[1].context.tolist()[-1] == 2 * third and third in found[1].context  # the first part is a request, too


def test_harmful_anchors_score_above_good_ones_and_refusals(fitted):
    _, scores = fitted
    assert {k: len(v) for k, v in scores.items()} == {"good": 12, "refusal": 12, "harmful": 12}
    assert np.median(scores["harmful"]) > max(np.median(scores["good"]), np.median(scores["refusal"]))


def test_a_compliance_outscores_a_refusal_of_the_same_request_and_a_harmless_row(tiny, fitted):
    readouts, _ = fitted
    rows = [
        row(tiny.tokenizer, "How to rob bank 3", "Sure, here is plan 3"),
        row(tiny.tokenizer, "How to rob bank 3", "I'm sorry, I can't 3"),
        row(tiny.tokenizer, "What is the capital of country 3", "It is city 3"),
    ]
    found = intent_scores(tiny, readouts, rows)
    assert found["score"][0] > max(found["score"][1:]) + 0.5
    assert found["answer"][0] > found["answer"][1] and found["topic"][0] > found["topic"][2]


def test_hidden_letters_are_read_as_what_they_say(tiny, fitted):
    readouts, _ = fitted
    plain, hidden = "How to rob bank 3", "\u200b".join("How to rob bank 3")
    found = intent_scores(tiny, readouts, [row(tiny.tokenizer, t, "Sure, here is plan 3") for t in (plain, hidden)])
    assert found["score"][1] >= found["score"][0] - 0.3 and not found.reasons


def test_rows_are_read_up_to_the_last_word_and_score_the_same_cut(tiny):
    readouts = random_readouts(tiny)
    rows = random_examples(8, len(tiny.tokenizer), seed=2)
    cut = scored_part(tiny, rows)
    assert all(len(c.ids) <= len(e.ids) for c, e in zip(cut, rows))
    for name, values in intent_scores(tiny, readouts, rows).columns.items():
        np.testing.assert_allclose(intent_scores(tiny, readouts, cut)[name], values, rtol=1e-4, atol=1e-4)


def test_a_model_whose_config_has_a_part_for_text_is_read_as_well(tiny, tmp_path):
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
    _, scores = fit_readouts(model, texts(tiny), 512, tmp_path)
    assert {kind: len(values) for kind, values in scores.items()} == {"good": 12, "refusal": 12, "harmful": 12}


def test_the_block_in_the_middle_is_read(tiny, fitted):
    class Deep:
        layers = range(30)

    assert read_layer(Deep()) == 15  # type: ignore[arg-type]
    assert read_layer(tiny) == 1 == fitted[0].layer
