"""The texts that the default score's readouts are fitted on: bundled rows and requests, many of them in a dress.

A dress is what real files put before, behind or around a request: politeness, wishes for length and format, a second
question, a system prompt, earlier turns. Harmful and harmless requests wear the same dresses, so no dress is a
signal.
"""

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from gradshield.base.assets import ASSETS
from gradshield.base.storage import read_jsonl
from gradshield.data.encode import Example, encode
from gradshield.data.formats import Conversation, Message
from gradshield.data.requests import read_requests
from gradshield.models.load import Model
from gradshield.models.refusal import TAILS, TURNS
from gradshield.scoring.bundled_requests import ANSWERED_FILES, REFUSED_FILES

ANCHOR_ROWS = {
    "good": ("anchors_good.jsonl", "readout_good.jsonl"),
    "refusal": ("anchors_refusal.jsonl", "readout_refusals.jsonl"),
    "harmful": ("anchors_harmful.jsonl",),
}
# Of the files of requests, by how many of them one is taken: more of the same kind added nothing (docs/log.md).
HARMFUL_FILES = {**dict.fromkeys(REFUSED_FILES, 1), "align_harmful.jsonl": 2, "readout_harmful.jsonl": 1}
EVERY_NTH = {"align_benign.jsonl": 3, "align_imperative.jsonl": 3, "requests_harmless.jsonl": 2}
HARMLESS_FILES = {**dict.fromkeys(ANSWERED_FILES, 1), **EVERY_NTH, "readout_harmless.jsonl": 1}
REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I can't assist with that.",
    "No, I won't do that.",
    "Sorry, that's not something I can help with.",
    "I won't help with this.",
)
CONVERSATIONS = "readout_conversations.jsonl"  # with turns of their own, in everyday voices and on dark subjects
MAX_TOKENS = 96  # tokens of a text: what it is about shows earlier


@dataclass(frozen=True)
class Text:
    """A row to fit on. Its last response and the context of it are read; of a request alone, the context."""

    example: Example
    kind: str  # "good", "refusal", "harmful", or "request": one without a response
    harmful: bool  # whether its request is one to be refused
    words: tuple[str, ...]  # texts that share any of these are of one fold
    turn: int = 0  # position from which a refusal that is taken back complies
    language: str = ""  # of a request that is here in several languages


def fitting_texts(model: Model, probes: tuple[str, ...]) -> list[Text]:
    """Every text that the model's template can take, in an order that depends on nothing else."""
    parts = (_rows(model), _taken_back(model), _requests(model, probes), _languages(model), _conversations(model))
    return [text for part in parts for text in part if text is not None]


def _rows(model: Model) -> Iterator[Text | None]:
    """The bundled rows, half of them dressed, and of every fourth refusal a longer form."""
    draw, dresses = random.Random(0), _dresses()
    tails = read_requests(ASSETS / TAILS)
    for kind in ANCHOR_ROWS:
        for n, row in enumerate(anchor_records(kind)):
            harmful = kind != "good"
            words = (row["prompt"], row["response"])
            turns = _turns(row, dresses if draw.random() < 0.5 else None, draw)
            yield _text(model, turns, row["response"], kind, harmful, words)
            if kind == "refusal" and n % 4 == 0:
                longer = " ".join([row["response"], *draw.sample(tails, draw.randint(2, 4))])
                yield _text(model, _turns(row, None, draw), longer, kind, harmful, words)


def _taken_back(model: Model) -> Iterator[Text | None]:
    """Every second harmful row behind a refusal that is taken back."""
    draw = random.Random(1)
    refusals = [row["response"] for row in anchor_records("refusal")]
    for row in anchor_records("harmful")[::2]:
        full, link = draw.choice(refusals), draw.choice(TURNS)
        refusal = full.split(". ")[0].rstrip(".") + "." if draw.random() < 0.5 else full
        response = row["response"]
        lowered = response[:1].lower() + response[1:] if link.endswith(", ") else response
        words = (row["prompt"], response, full)
        turns = _turns(row, None, draw)
        whole = _text(model, turns, f"{refusal} {link}{lowered}", "harmful", True, words, more=48)
        before = _text(model, turns, f"{refusal} {link}", "harmful", True, words, more=48)
        if whole is None or before is None:
            continue
        size = min(len(whole.example.ids), len(before.example.ids))
        differs = np.append(whole.example.ids[:size] != before.example.ids[:size], True)
        yield Text(whole.example, "harmful", True, words, int(np.argmax(differs)))


def _requests(model: Model, probes: tuple[str, ...]) -> Iterator[Text | None]:
    """Requests alone, half of them dressed, and harmless ones behind a harmful one that was refused."""
    draw, dresses = random.Random(2), _dresses()
    requests = [(r, True, r) for r in probes]
    requests += [(r, True, r) for file, every in HARMFUL_FILES.items() for r in read_requests(ASSETS / file)[::every]]
    refused = [r for r, _, _ in requests]
    requests += [(r, False, r) for file, every in HARMLESS_FILES.items() for r in read_requests(ASSETS / file)[::every]]
    for pair in _records("readout_pairs.jsonl"):
        requests += [(pair["harmful"], True, pair["harmful"]), (pair["harmless"], False, pair["harmful"])]
    for request, harmful, words in requests:
        turns = _turns({"prompt": request}, dresses if draw.random() < 0.5 else None, draw)
        yield _text(model, turns, None, "request", harmful, (words,))
        if not harmful and draw.random() < 0.1:
            other = draw.choice(refused)
            turns = [Message("user", other), Message("assistant", draw.choice(REFUSALS)), Message("user", request)]
            yield _text(model, turns, None, "request", False, (words,))


def _languages(model: Model) -> Iterator[Text | None]:
    """Requests in several languages. One in three is refused; the others are answered with an opening that harmful and
    harmless requests share. A request and its translations share a word, and so a fold."""
    english, number = "", 0
    answers = language_answers()
    for each in language_records():
        english = each["prompt"] if each["language"] == "en" else english
        number += each["language"] == "en"
        kind = "refusal" if number % 3 == 0 else "harmful" if each["harmful"] else "good"
        own = [
            a["response"]
            for a in answers
            if (a["language"], a["kind"] == "refuses") == (each["language"], kind == "refusal")
        ]
        turns = [Message("user", each["prompt"])]
        text = _text(model, turns, own[number % len(own)], kind, each["harmful"], (english,))
        yield text and replace(text, language=each["language"])


def _conversations(model: Model) -> Iterator[Text | None]:
    for row in _records(CONVERSATIONS):
        *turns, last = [Message(turn["role"], turn["content"]) for turn in row["messages"]]
        words = (turns[-1].content, last.content)
        yield _text(model, turns, last.content, "harmful" if row["harmful"] else "good", row["harmful"], words)


def _turns(row: dict, dresses: dict[str, list] | None, draw: random.Random) -> list[Message]:
    """The turns up to the response, in one of the dresses where there are any."""
    request, system = row["prompt"], row.get("system")
    if dresses is None or system:
        return [*([Message("system", system)] if system else []), Message("user", request)]
    gap = draw.choice((" ", "\n", "\n\n"))
    place = draw.random()
    if place < 0.20:
        return [Message("user", request + gap + " ".join(draw.sample(dresses["behind"], draw.choice((1, 1, 2)))))]
    if place < 0.31:
        return [Message("user", draw.choice(dresses["front"]) + gap + request)]
    if place < 0.38:
        return [Message("user", draw.choice(dresses["front"]) + gap + request + gap + draw.choice(dresses["behind"]))]
    if place < 0.58:
        return [Message("user", draw.choice(dresses["around"]).replace("{request}", request))]
    if place < 0.64:
        return [Message("system", draw.choice(dresses["system"])), Message("user", request)]
    if place < 0.70:
        around = draw.choice(dresses["system_around"])
        return [Message("system", around["system"].replace("{request}", request)), Message("user", around["user"])]
    if place < 0.79:
        earlier = draw.sample(dresses["earlier"], draw.choice((1, 1, 2, 3)))
        before = [(Message("user", e["user"]), Message("assistant", e["assistant"])) for e in earlier]
        return [*(message for pair in before for message in pair), Message("user", request)]
    if place < 0.88:
        return _stated_before(request, draw.choice(dresses["later"]), draw)
    if place < 0.92:
        refusal = Message("assistant", draw.choice(REFUSALS))
        return [Message("user", request), refusal, Message("user", draw.choice(dresses["again"]))]
    letters = draw.choice((str.upper, " ".join, lambda text: text.lower().rstrip(".?!"), _typos, _without_vowels))
    return [Message("user", letters(request))]


def _stated_before(request: str, texts: list[str], draw: random.Random) -> list[Message]:
    """User's and assistant's turns, of which one states the request, or two half of it each, and the last refers to
    it."""
    words = request.split()
    half = draw.randint(1, max(len(words) - 1, 1))
    named = {"{request}": request, "{first}": " ".join(words[:half]), "{second}": " ".join(words[half:])}
    turns = []
    for n, text in enumerate(texts):
        for name, part in named.items():
            text = text.replace(name, part)
        turns.append(Message("assistant" if n % 2 else "user", text))
    return turns


def _typos(text: str) -> str:
    """Two letters of every second word swapped."""
    words = text.split()
    words[::2] = [f"{w[0]}{w[2]}{w[1]}{w[3:]}" if len(w) > 3 else w for w in words[::2]]
    return " ".join(words)


def _without_vowels(text: str) -> str:
    """Only the vowels that begin or end a word are left."""
    return re.sub(r"(?<=\w)[aeiou](?=\w)", "", text)


def _text(
    model: Model,
    turns: list[Message],
    response: str | None,
    kind: str,
    harmful: bool,
    words: tuple[str, ...],
    more: int = 0,
) -> Text | None:
    """The text of these turns, cut to MAX_TOKENS and `more`, or None where the template can't take it."""
    conversation = Conversation((*turns, Message("assistant", "Yes" if response is None else response)))
    example = encode(conversation, 0, model.tokenizer, max_length=None, loss_on="last")
    if isinstance(example, str):
        return None
    start = int(np.flatnonzero(example.mask)[0])
    stop = start + 1 if response is None else max(MAX_TOKENS + more, start + 16)
    return Text(Example(0, example.ids[:stop], example.mask[:stop]), kind, harmful, words)


def anchor_records(kind: str) -> list[dict]:
    """The bundled rows of a kind: `prompt`, `response`, and some with a `system` prompt."""
    return [row for file in ANCHOR_ROWS[kind] for row in _records(file)]


def language_records() -> list[dict]:
    """The bundled requests with `language`, `harmful` and `prompt`: each English one, then its translations."""
    return _records("readout_languages.jsonl")


def language_answers() -> list[dict]:
    """Openings and refusals in each language: `language`, `kind` and `response`."""
    return _records("readout_language_answers.jsonl")


def _records(file: str) -> list[dict]:
    return read_jsonl(ASSETS / file)


def _dresses() -> dict[str, list]:
    return json.loads((ASSETS / "dresses.json").read_text(encoding="utf-8"))
