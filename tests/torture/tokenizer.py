"""Hostile tokenizers and chat templates."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import CHATML

from torture.changes import CASES, Change, case, edit, setting, written


def tokenizer(change: Callable[[dict], Any]) -> Change:
    return lambda folder, _: edit(folder / "tokenizer.json", change)


def pattern(regex: str) -> Change:
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}

    def change(content: dict) -> None:
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, content["pre_tokenizer"]]}

    return tokenizer(change)


for regex in (
    "(a+)+$",
    r"(\w+\s?)+$",
    "(x+x+)+y",
    "(",
    "(?<=a+)b",
    "[",
    r"(.*)*!",
    "a{1,99999}{1,99999}",
    "(?>" * 500,
    "",
    "$",
    "^",
):
    CASES[f"llama: regex {regex[:20]}"] = ("llama", pattern(regex))
for n, change in enumerate(
    (
        lambda c: c["model"].update(type="no such"),
        lambda c: c["model"].update(vocab={}),
        lambda c: c["model"].update(vocab={"a": -1}),
        lambda c: c["model"].update(vocab={k: v + 10_000 for k, v in c["model"]["vocab"].items()}),
        lambda c: c["model"].update(vocab={k: 2**31 + v for k, v in c["model"]["vocab"].items()}),
        lambda c: c["model"].update(vocab=dict.fromkeys(c["model"]["vocab"], 5)),
        lambda c: c["model"]["vocab"].pop("S"),
        lambda c: c["model"]["vocab"].pop("e"),
        lambda c: c["model"].update(merges=[["no", "such"]]),
        lambda c: c["model"].update(merges="x"),
        lambda c: c.update(pre_tokenizer=None),
        lambda c: c.update(decoder=None),
        lambda c: c.update(decoder={"type": "WordPiece", "prefix": "##", "cleanup": True}),
        lambda c: c.update(normalizer={"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}),
        lambda c: c.update(normalizer={"type": "Replace", "pattern": {"String": "a"}, "content": "b" * 10**6}),
        lambda c: c.update(normalizer={"type": "Replace", "pattern": {"Regex": "."}, "content": ""}),
        lambda c: c.update(normalizer={"type": "Lowercase"}),
        lambda c: c.update(post_processor={"type": "no such"}),
        lambda c: c.update(truncation={"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}),
        lambda c: c.update(
            padding={"strategy": {"Fixed": 10**9}, "direction": "Left", "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
        ),
        lambda c: c.update(added_tokens=[]),
        lambda c: c["added_tokens"].append({**c["added_tokens"][0], "id": 5000, "content": "<more>"}),
        lambda c: c["added_tokens"].append({**c["added_tokens"][0], "id": 2**31, "content": "<more>"}),
        lambda c: c["added_tokens"].append({**c["added_tokens"][0], "id": 600, "content": ""}),
        lambda c: c.update(version="9"),
    )
):
    CASES[f"llama: tokenizer {n}"] = ("llama", tokenizer(lambda content, change=change: change(content) and None))
for key in ("eos_token", "pad_token", "bos_token", "unk_token"):
    for value in (None, "", "no such token", 3, {"content": 5}, ["x"], "x" * 10**5):
        setting("llama", "tokenizer_config.json", **{key: value})
for value in ("NoSuchTokenizer", "LlamaTokenizer", "BertTokenizer", 3, None, "__class__"):
    setting("llama", "tokenizer_config.json", tokenizer_class=value)
setting(
    "llama",
    "tokenizer_config.json",
    model_max_length="x",
    added_tokens_decoder={"x": 1},
    padding_side="up",
    clean_up_tokenization_spaces="x",
    auto_map={"AutoTokenizer": ["evil.Tokenizer", None]},
    extra_special_tokens=[1],
    add_bos_token=True,
    split_special_tokens=7,
    model_input_names="x",
)


@case("llama")
def neither_eos_nor_pad(folder: Path, draw: random.Random) -> None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            edit(folder / name, lambda c: {k: v for k, v in c.items() if k not in ("eos_token", "pad_token")})


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = "{% set n = namespace(s='xxxxxxxx') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}"
for template in (
    "",
    " ",
    "{{",
    "{% for m in messages %}",
    "{{ no.such.thing }}",
    "{{ 1 / 0 }}",
    LOOP,
    DOUBLING,
    "{{ 9 ** (9 ** 9) }}",
    "{{ 'a' * 9999999999 }}",
    "{{ raise_exception('no') }}",
    "{{ messages[0].content }}",
    "{{ messages[-1].content }}",
    "{{ messages[1].content }}{{ messages[0].content }}",
    "{% for m in messages | reverse %}{{ m.content }}\n{% endfor %}",
    "{{ messages[99].content }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{% include 'x' %}",
    "{% import 'os' as os %}",
    "{{ messages }}",
    "always the same",
    "{{ bos_token * 10 }}" + CHATML,
    "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "{{ '%999999999d' % 1 }}",
    "{{ range(10**9) | list | length }}",
    "{% set x = 1 %}" * 20_000 + CHATML,
    "(" * 3000,
    "{{ " + "(" * 2000 + "1" + ")" * 2000 + " }}",
    "{{ now() }}",
    "\x00",
    "{{ messages | tojson }}",
    "{{ messages[0]['role'] | lower | no_such }}",
    "{{ 'é' * 100 }}{{ messages[0].content }}",
    CHATML.replace("m.content", "m.content | upper"),
    CHATML.replace("m.content", "m.content[:2]"),
    CHATML + LOOP,
    "{% if messages | length > 1 %}" + LOOP + "{% endif %}" + CHATML,
    "{{ strftime_now('%') }}" + CHATML,
    "{{ '%s' | format(messages) }}",
    "{{ lipsum(n=10**6) }}",
    "{{ dict(a=1).no }}" + CHATML,
    "{{ '{0.__class__}'.format(1) }}",
):
    CASES[f"llama: template {len(CASES)} {template[:30]!r}"] = (
        "llama",
        lambda folder, _, t=template: (folder / "chat_template.jinja").write_text(t) and None,
    )
CASES["llama: no template"] = ("llama", lambda folder, _: (folder / "chat_template.jinja").unlink(missing_ok=True))
CASES["llama: template in latin-1"] = ("llama", written("chat_template.jinja", b"caf\xe9"))
for value in ([], [{"name": "default"}], [{"name": "x", "template": CHATML}], 3, {"default": CHATML}):

    def _named(folder: Path, _: random.Random, value: Any = value) -> None:
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        edit(folder / "tokenizer_config.json", lambda c: c | {"chat_template": value})

    CASES[f"llama: chat_template is {str(value)[:40]}"] = ("llama", _named)
