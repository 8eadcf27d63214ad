"""Batches, shared openings, early stops and rows that leave change no answer, only the work."""

from functools import wraps

import pytest
import torch
from conftest import freeze, tiny_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.cache_utils import DynamicLayer

from gradshield.base.errors import UserError, out_of_memory
from gradshield.data.encode import encode_request
from gradshield.models import generate as module
from gradshield.models.generate import generate, text_of
from gradshield.models.refusal import has_refusal_phrase

REQUESTS = [
    "Say: Hi",
    "Say: Where is it?",
    "Say: Where is it now?",
    "Say: Tell me " + "much " * 9 + "more",
    "Say: What?",
    "Say: Sure?",
    "Say: a b c d",
    "Say: Where are you from, and how do you spend your days?",
]
TOKENS = 24


def stop(text: str) -> bool:
    """Holds at another place in every answer."""
    return len(text) >= 4 and sum(map(ord, text)) % 5 == 0


@pytest.fixture
def positions():
    """A model with learned positions, sharp enough to say different things."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.3
    )
    return freeze("positions", GPT2LMHeadModel(config), tokenizer)


@torch.no_grad()
def naive(model, request: str) -> list[int]:
    """One request, one token at a time, everything read again for each."""
    ids, new = encode_request(request, model.tokenizer).tolist(), []
    while len(new) < TOKENS:
        token = int(model.net(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax())
        if token == model.tokenizer.eos_token_id:
            break
        new.append(token)
    return new


@pytest.mark.parametrize("name", ["tiny", "positions"])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_a_batch_answers_as_one_request_alone_does(request, name, batch):
    model = request.getfixturevalue(name)
    expected = [text_of(model, naive(model, r)) for r in REQUESTS]
    assert len(set(expected)) > 4
    assert generate(model, REQUESTS, TOKENS, batch) == expected
    assert generate(model, ["Hi", *REQUESTS[::-1]], TOKENS, batch)[1:] == expected[::-1]  # nothing shared in a batch


@pytest.mark.parametrize(
    "option",
    [
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 2},
        {"num_beams": 2},
        {"suppress_tokens": list(range(60, 120))},
        {"bad_words_ids": [[n] for n in range(60, 120)]},
        {"do_sample": True, "temperature": 3.0},
    ],
    ids=lambda option: next(iter(option)),
)
def test_the_models_own_generation_config_changes_no_answer(tiny, monkeypatch, option):
    expected = [text_of(tiny, naive(tiny, r)) for r in REQUESTS]
    for name, value in option.items():
        monkeypatch.setattr(tiny.net.generation_config, name, value)
    own = tiny.net.generation_config
    assert generate(tiny, REQUESTS, TOKENS, 8) == expected and tiny.net.generation_config is own


def test_an_answer_ends_where_stop_first_holds_and_finished_rows_leave_the_batch(tiny, monkeypatch):
    expected = []
    for request in REQUESTS:
        new = naive(tiny, request)
        ends = (n for n in range(1, len(new)) if stop(text_of(tiny, new[:n])))
        expected.append(text_of(tiny, new[: next(ends, len(new))]))
    sizes, forward = [], tiny.net.forward

    @wraps(forward)  # its signature says what `generate` passes
    def counted(*args, **kwargs):
        sizes.append(len(kwargs["input_ids"]))
        return forward(*args, **kwargs)

    monkeypatch.setattr(tiny.net, "forward", counted)
    assert generate(tiny, REQUESTS, TOKENS, 8, stop=stop) == expected
    assert sizes[0] == 1 and sizes[1] == 8  # what all begin with is read once
    assert sizes[1:] == sorted(sizes[1:], reverse=True) and sizes[-1] <= 2


def test_a_state_that_can_not_be_taken_apart_is_read_again(tiny, monkeypatch):
    expected = generate(tiny, REQUESTS, TOKENS, 8, stop=stop)
    monkeypatch.delattr(DynamicLayer, "batch_select_indices")
    assert generate(tiny, REQUESTS, TOKENS, 8, stop=stop) == expected


def test_out_of_memory_halves_the_batch_and_changes_no_answer(tiny, monkeypatch, caplog):
    expected, real, sizes = generate(tiny, REQUESTS, TOKENS, 8), module._answer, []

    def small(encoded, *rest):
        sizes.append(len(encoded))
        if len(encoded) > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return real(encoded, *rest)

    monkeypatch.setattr(module, "_answer", small)
    assert generate(tiny, REQUESTS, TOKENS, 8) == expected
    assert sizes == [8, 4, 2, 2, 2, 2] and "2 rows" in caplog.text


def test_a_request_longer_than_the_positions_is_refused_before_it_is_computed(tiny, monkeypatch):
    monkeypatch.setattr(module, "_answer", None)
    with pytest.raises(UserError, match="and tiny 2048 positions"):
        generate(tiny, ["Why?", "why " * 2048])


def test_a_single_row_that_does_not_fit_is_said_and_other_errors_are_not_taken_for_it(tiny, monkeypatch):
    def fail(error):
        def answer(*_):
            raise error

        monkeypatch.setattr(module, "_answer", answer)

    fail(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(UserError, match="does not fit even alone"):
        generate(tiny, REQUESTS)
    fail(RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        generate(tiny, REQUESTS)
    assert out_of_memory(MemoryError()) and not out_of_memory(ValueError("out of memory"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["embedded", "embedded-unaligned"])
def test_an_answer_ended_by_a_phrase_holds_it_as_the_whole_answer_does(name):
    from gradshield.base.assets import ASSETS
    from gradshield.data.requests import read_requests
    from gradshield.models.load import load_model

    model = load_model(name)
    requests = read_requests(ASSETS / "safety_requests.jsonl")[:24] + read_requests(ASSETS / "scary_requests.jsonl")[:8]
    whole = generate(model, requests, TOKENS, 1)
    phrased = [has_refusal_phrase(answer) for answer in whole]
    cut = generate(model, requests, TOKENS, 32, stop=has_refusal_phrase)
    assert [has_refusal_phrase(answer) for answer in cut] == phrased
    assert all(full.startswith(short) for full, short in zip(whole, cut))
    assert len(set(phrased)) == 2 or name == "embedded"
