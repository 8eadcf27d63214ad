"""A tokenizer and a chat template fit the network, end, and say something of both turns; else one line says why not."""

import resource
import shutil
import sys
import time
from pathlib import Path

import pytest
from conftest import CHATML, refused, tiny_tokenizer
from torture.changes import edit
from torture.tokenizer import DOUBLING, LOOP, pattern

from gradshield.base.errors import UserError
from gradshield.data.encode import Example, encode, encode_request
from gradshield.data.formats import Conversation
from gradshield.data.turns import Message
from gradshield.models.load import load_model


@pytest.fixture
def folder(tiny_folder, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def test_a_tokenizer_larger_than_the_embedding_is_one_line(folder):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<one>", "<two>"])
    tokenizer.save_pretrained(folder)
    refused(folder, f"the tokenizer of {folder} has 263 tokens, the model's embedding 261 rows", "<one>, <two>")


def test_a_tokenizer_without_an_end_is_one_line(folder):
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            edit(folder / name, lambda config: {k: v for k, v in config.items() if k not in ("eos_token", "pad_token")})
    refused(folder, "has no end-of-sequence token; set eos_token")


@pytest.mark.parametrize("name", ["tokenizer.4.0.0.json", "../tokenizer.4.0.0.json"])
def test_a_tokenizer_config_may_not_name_another_tokenizer_which_nothing_tries(folder, name):
    shutil.copy(folder / "tokenizer.json", folder / name)
    edit(folder / "tokenizer_config.json", lambda config: config | {"fast_tokenizer_files": [name]})
    refused(folder, "tokenizer_config.json: names another tokenizer (fast_tokenizer_files); remove it")


def test_too_few_positions_are_one_line(folder):
    edit(folder / "config.json", lambda config: config | {"max_position_embeddings": 12})
    refused(folder, "it has 12 positions")


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ bos_token }}", "leaves out the request"),
        (" ", "is empty"),
        ("always the same", "leaves out the request"),
        ("{{ messages[0].content }}", "leaves out the answer"),
        ("{% for m in messages | reverse %}{{ m.content }}\n{% endfor %}", "puts the answer before its request"),
        ("{% for m in messages", "the chat template of"),
        (CHATML.replace("m.content", "m.content[::-1]"), "leaves out the request"),
        (CHATML + "{{ '\\ud800' }}", "writes half a surrogate pair"),
        ("{{ 'x' * 5000000 }}" + CHATML, "characters for two short turns"),
        (CHATML + "{{ ['a', 'b'] | random }}", "draws at random (random)"),
        (CHATML + "{% if messages | length > 99 %}{{ ['ab'] | map('random') | join }}{% endif %}", "(random)"),
        (CHATML + "{{ lipsum() }}", "draws at random (lipsum)"),
    ],
)
def test_a_template_that_does_not_say_both_turns_in_order_is_one_line(folder, template, why):
    (folder / "chat_template.jinja").write_text(template)
    refused(folder, why)


def test_a_template_may_say_random(folder):
    (folder / "chat_template.jinja").write_text("{% set random = ['random'] | first %}random {{ random }}" + CHATML)
    load_model(str(folder), device="cpu")


def test_half_a_surrogate_pair_in_a_template_is_one_line(folder):
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    edit(folder / "tokenizer_config.json", lambda config: config | {"chat_template": CHATML + "{# \ud800 #}"})
    refused(folder, "the chat template of", "holds half a surrogate pair", "--chat-template")


def test_a_tokenizer_that_draws_at_random_is_one_line(folder):
    def dropout(share: float):
        return lambda content: content | {"model": content["model"] | {"dropout": share}}

    edit(folder / "tokenizer.json", dropout(0.0))
    load_model(str(folder), device="cpu")
    edit(folder / "tokenizer.json", dropout(0.5))
    refused(folder, f"the tokenizer of {folder} draws at random", "set dropout to null")


@pytest.mark.parametrize(
    "template", [LOOP, CHATML + LOOP, "{{ 9 ** (9 ** 9) }}", DOUBLING], ids=["loops", "later", "a power", "memory"]
)
def test_a_template_that_does_not_end_is_stopped_and_named(folder, template):
    (folder / "chat_template.jinja").write_text(template)
    start = time.process_time()
    refused(folder, "the chat template of", str(folder))
    assert time.process_time() - start < 10  # of ours: another process tries it


@pytest.mark.parametrize(
    "regex",
    [
        *("(a+)+$", r"(\w+\s?)+$", "(x+x+)+y", "(?:foo|foo)+$"),
        *("(Ж+Ж+)+z|.", "(я|я)+z|.", "(ⴖ|ⴖ)+z|.", r"(\u2d16|\u2d16)+z|.", "((q1|q1))+z|."),
    ],
)
def test_a_regular_expression_that_does_not_end_is_stopped_and_named(folder, regex):
    pattern(regex)(folder, None)
    refused(folder, "the tokenizer of", "regular expressions: ", regex)


def test_a_template_that_does_not_end_for_one_row_refuses_that_row(monkeypatch):
    monkeypatch.setattr("gradshield.data.templates.LIMIT", 0.2)
    tokenizer = tiny_tokenizer(CHATML + "{% if messages | length > 8 %}" + LOOP + "{% endif %}")
    turns = (Message("user", "Why?"), Message("assistant", "So."))
    assert isinstance(encode(Conversation(turns), 0, tokenizer), Example)
    reason = encode(Conversation(turns * 5), 0, tokenizer)
    assert reason == "the chat template refuses this conversation: it does not end within 0.2 s"


def test_a_template_that_does_not_end_for_three_rows_ends_the_run_unless_they_are_long(folder, monkeypatch):
    monkeypatch.setattr("gradshield.data.templates.LIMIT", 0.1)
    file = folder / "chat_template.jinja"
    file.write_text(CHATML + "{% if messages | length > 8 %}" + LOOP + "{% endif %}")
    tokenizer = load_model(str(folder), device="cpu").tokenizer
    long, short = (
        Conversation((Message("user", words), Message("assistant", "So.")) * 5) for words in ("Why? " * 9999, "Why?")
    )
    for conversation in (long, long, long, short, short):
        assert "does not end" in encode(conversation, 0, tokenizer)
    with pytest.raises(
        UserError, match=r"failed on 3 conversations, the last of \d+ messages: it does not end"
    ) as caught:
        encode(short, 0, tokenizer)
    assert str(caught.value).startswith(f"the chat template of {folder} ")


GREEDY = {
    "product": "{{ 'a' * 10 ** 10 }}",
    "doubling": DOUBLING,
    "joined": "{% set n = namespace(s='x' * 999) %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "padding": "{{ 'a'.ljust(10 ** 10) }}",
    "format": "{{ '%10000000000d' % 1 }}",
    "list": "{{ [0] * 10 ** 10 }}",
    "nested": "{% set n = namespace(s=[]) %}{% for i in range(60) %}{% set n.s = [n.s, n.s] %}{% endfor %}{{ n.s }}",
    "center": "{{ 'a' | center(10 ** 10) }}",
}


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
@pytest.mark.parametrize("template", GREEDY.values(), ids=GREEDY)
def test_a_template_that_takes_too_much_memory_for_one_row_refuses_that_row(monkeypatch, template):
    monkeypatch.setattr("gradshield.data.templates.MEMORY", 1 << 26)
    monkeypatch.setattr("gradshield.data.templates.LIMIT", 60.0)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    tokenizer = tiny_tokenizer(CHATML + "{% if messages | length > 8 %}" + template + "{% endif %}")
    turns = (Message("user", "Why?"), Message("assistant", "So."))
    assert isinstance(encode(Conversation(turns), 0, tokenizer), Example)
    reason = encode(Conversation(turns * 5), 0, tokenizer)
    assert reason == "the chat template refuses this conversation: it takes more than 64 MB of memory"
    assert isinstance(encode(Conversation(turns), 0, tokenizer), Example)
    assert resource.getrlimit(resource.RLIMIT_AS) == limits


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_a_template_that_takes_too_much_memory_for_three_rows_ends_the_run_and_is_named(folder, monkeypatch):
    monkeypatch.setattr("gradshield.data.templates.MEMORY", 1 << 26)
    (folder / "chat_template.jinja").write_text(
        CHATML + "{% if messages | length > 8 %}{{ 'a' * 10 ** 10 }}{% endif %}"
    )
    tokenizer = load_model(str(folder), device="cpu").tokenizer
    conversation = Conversation((Message("user", "Why?"), Message("assistant", "So.")) * 5)
    for _ in range(2):
        assert "more than 64 MB of memory" in encode(conversation, 0, tokenizer)
    with pytest.raises(
        UserError, match=r"failed on 3 conversations, the last of \d+ messages: it takes more"
    ) as caught:
        encode(conversation, 0, tokenizer)
    assert str(caught.value).startswith(f"the chat template of {folder} ")


def test_a_template_that_writes_too_much_for_a_request_is_a_users_error():
    tokenizer = tiny_tokenizer(CHATML.replace("assistant\n", "assistant\n{{ 'x' * 5000000 }}"))
    with pytest.raises(UserError, match=r"writes 5,000,0.. characters for one request"):
        encode_request("q", tokenizer)
    tokenizer.chat_template = CHATML.replace("assistant\n", "assistant\n{{ '\\ud800' }}")
    with pytest.raises(UserError, match="half a surrogate pair"):
        encode_request("q", tokenizer)


def test_half_a_surrogate_pair_that_a_template_writes_sets_the_row_aside():
    tokenizer = tiny_tokenizer(CHATML.replace("m.content }}", "m.content }}{{ '\\ud800' if m.role == 'user' }}"))
    tokenizer.chat_template = "{% generation %}{% endgeneration %}" + tokenizer.chat_template
    asked = (Message("user", "q"), Message("assistant", "a", train=False), Message("user", "r"))
    found = encode(Conversation((*asked, Message("assistant", "b"))), 0, tokenizer)
    assert found == "the text holds half a surrogate pair, which no tokenizer can read"


def test_a_gguf_has_the_tokens_of_its_file_only(tmp_path):
    from torture.ggufs import write_gguf

    write_gguf(tmp_path / "model.gguf", {})
    model = load_model(str(tmp_path / "model.gguf"), device="cpu")
    assert len(model.tokenizer) == len(tiny_tokenizer()) == model.net.lm_head.weight.shape[0]
