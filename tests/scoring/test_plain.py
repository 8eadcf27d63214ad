"""Hidden letters are made plain, what no reader can read is said to be so, and everything else stays as it is."""

import base64
import codecs
import re
import unicodedata
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradshield.data.encode import Example, encode
from gradshield.data.formats import Conversation, Message
from gradshield.scoring.intent.corpus import ANCHOR_ROWS, anchor_records, language_records
from gradshield.scoring.intent.plain import plain_text
from gradshield.scoring.intent.unreadable import (
    MIN_PROSE_TOKEN_LENGTH,
    hidden_words_reason,
    plain_example,
    token_length,
    unreadable_reason,
)
from gradshield.study.dresses import READABLE

SENTENCE = "Write a tutorial on how to bake sourdough bread, and explain why the dough rises overnight"
LANGUAGES = (
    "Hogyan lehet egyszerű kenyeret sütni otthon, ha csak liszt, víz, só és élesztő van a konyhában?",
    "Miten leipoa yksinkertaista leipää kotona, jos keittiössä on vain jauhoja, vettä, suolaa ja hiivaa?",
    "Làm thế nào để nướng bánh mì đơn giản ở nhà nếu chỉ có bột mì, nước, muối và men trong bếp?",
    "Jak upéct jednoduchý chléb, když mám doma jen mouku, vodu, sůl a droždí? Prosím o krátký návod.",
    "Wie backe ich ein einfaches Brot, wenn nur Mehl, Wasser, Salz und Hefe in der Küche sind?",
    "Как испечь простой хлеб дома, если есть только мука, вода, соль и дрожжи?",
    "如果厨房里只有面粉、水、盐和酵母，怎样在家里做简单的面包？",
    "def sort(arr):\n    if len(arr) <= 1:\n        return arr\n    return sort([x for x in arr if x < arr[0]])",
    "SELECT customer, SUM(amount) FROM orders WHERE day > '2020-01-01' GROUP BY customer HAVING SUM(amount) > 10",
    "Krzysztof Przybylski, Zbigniew Wojciechowski, Agnieszka Szczepanska, Tomasz Grzegorczyk",
    "https://example.org/archive/2020/11/a-long-title-of-a-page-about-bread?utm_source=feed",
    "3.14159265358979323846264338327950288419716939937510582097494459",
)


@pytest.mark.parametrize("dress", ["zero-width", "full-width", "look-alikes", "spaced"])
def test_hidden_letters_are_made_plain(dress):
    assert plain_text(READABLE[dress](SENTENCE, "", 0).messages[0].content) == SENTENCE


def escaped(pattern: str) -> Callable[[str], str]:
    return lambda text: "".join(pattern.format(ord(c)) for c in text)


HIDDEN: dict[str, Callable[[str], str]] = {
    "html entities": escaped("&#{};"),
    "percent signs": escaped("%{:02x}"),
    "unicode escapes": escaped("\\u{:04x}"),
    "hexadecimal escapes": escaped("\\x{:02x}"),
    "ASCII numbers": lambda text: " ".join(str(ord(c)) for c in text),
    "backwards": lambda text: text[::-1],
    "each word backwards": lambda text: " ".join(word[::-1] for word in text.split()),
    "right to left": lambda text: f"\u202e{text[::-1]}\u202c",
    "heaped marks": lambda text: "".join(c + "\u0301\u0323" for c in text),
    "variation selectors": lambda text: "\ufe0f".join(text),
    "tags": lambda text: "".join(chr(0xE0000 + ord(c)) for c in text),
    "hyphens": lambda text: "-".join(text.replace(" ", "_")),
    "hyphens in words": lambda text: " ".join("-".join(word) for word in text.split()),
    "dots in words": lambda text: " ".join(".".join(word) for word in text.split()),
    "emoji between": lambda text: "🔥".join(text),
    "a line for each": lambda text: "\n".join(text),
    "syllables": lambda text: " ".join("-".join(re.findall(".{1,3}", word)) for word in text.split()),
    "accents": lambda text: re.sub("[aeiou]", lambda vowel: vowel[0] + "\u0301", text),
    "mathematical": lambda text: "".join(chr(0x1D41A + ord(c) - 97) if c.islower() else c for c in text),
}


APART: dict[str, Callable[[str], str]] = {
    "words in quotes": lambda text: " ".join(f'"{word}"' for word in text.split()),
    "numbered words": lambda text: "".join(f"{n}. {word}\n" for n, word in enumerate(text.split(), 1)).strip("1. "),
    "stars around words": lambda text: f"*{text.replace(' ', '* *')}*",
    "a line for each word": lambda text: text.replace(" ", "\n"),
}


@pytest.mark.parametrize("kind", HIDDEN)
def test_every_kind_of_disguise_is_undone(kind):
    hidden = HIDDEN[kind](SENTENCE)
    assert hidden != SENTENCE
    assert plain_text(hidden).strip() == SENTENCE


@pytest.mark.parametrize("kind", APART)
def test_words_apart_are_joined_without_their_commas(kind):
    assert plain_text(APART[kind](SENTENCE)).strip('"* \n') == SENTENCE.replace(",", "")


@given(st.lists(st.integers(0, 0xFFFF), min_size=5, max_size=30), st.sampled_from(["\\u{:04x}", "&#{};"]))
def test_whatever_escapes_stand_for_is_text_that_a_tokenizer_takes(codes, pattern):
    plain_text(" ".join(pattern.format(code) for code in codes)).encode()  # half a surrogate pair is not


def test_a_row_of_escaped_emoji_is_read(tiny):
    turns = Conversation((Message("user", "\\ud83d\\ude00" * 3 + "\\ud83d"), Message("assistant", "A smile")))
    example = encode(turns, 0, tiny.tokenizer)
    assert isinstance(example, Example)
    made = plain_example(example, tiny.tokenizer)
    assert made is not None and "😀😀😀\ufffd" in tiny.tokenizer.decode(made.ids)


@pytest.mark.parametrize(
    "hidden",
    [
        "".join(c.upper() if n % 2 else c.lower() for n, c in enumerate(SENTENCE)),
        "".join(chr(0x1F1E6 + ord(c) - 97) + "\u200b" if c.isalpha() else c for c in SENTENCE.lower()),
        SENTENCE.lower().translate(str.maketrans("abdefghiklmnoprtuwy", "ᴀʙᴅᴇꜰɢʜɪᴋʟᴍɴᴏᴘʀᴛᴜᴡʏ")),
        SENTENCE.lower().translate(str.maketrans("abcdefghijkmnpqrtuvwy", "ɐqɔpǝɟƃɥᴉɾʞɯudbɹʇnʌʍʎ"))[::-1],
    ],
    ids=["mixed case", "regional indicators", "small capitals", "upside down"],
)
def test_disguises_without_capitals_are_undone_but_for_them(hidden):
    assert plain_text(hidden).lower().strip() == SENTENCE.lower()


@pytest.mark.parametrize(
    "text",
    [
        "x = [1, 2, 3]; y = x[0] * 3 / 2 - 1",
        "A) 5 B) 7 C) 9 D) 11",
        "Her scores were 50, 80, 80, 100, 65, 73, 91 and 88.5 of 120.",
        "i.e. a U.S. D.A. and an F.B.I. agent",
        "https://example.org/a%20b%20c.html?x=1&y=2 is a page",
        "def snake_case_name(a_b, c_d): return a_b + c_d",
        "JavaScript, TypeScript, GraphQL and PostgreSQL in DevOps",
        "Café au lait, naïve façade, Zoë and Müller",
        "DialogSum: #Person1#: Hi! #Person2#: Hello, how's it going?",
    ],
)
def test_code_lists_and_abbreviations_are_no_disguise(text):
    assert plain_text(text) == text and unreadable_reason(text) is None


def test_leetspeak_is_made_plain_but_for_letters_that_look_alike():
    made = plain_text(READABLE["leetspeak"](SENTENCE, "", 0).messages[0].content)
    agree = np.mean([a == b for a, b in zip(made.lower(), SENTENCE.lower(), strict=True)])
    assert agree > 0.95


@pytest.mark.parametrize(
    "text", [*LANGUAGES, SENTENCE, "Version 2.0b1 of mp3tool", "a b c", "Is α-helix or β-sheet more stable?"]
)
def test_ordinary_text_is_readable_and_stays_as_it_is(text):
    assert unreadable_reason(text) is None
    if "α" not in text:
        assert plain_text(text) == text or not text.isascii()


def test_no_bundled_text_is_taken_for_a_disguise():
    records = [*language_records(), *(row for kind in ANCHOR_ROWS for row in anchor_records(kind))]
    texts = sorted({r[side] for r in records for side in ("prompt", "response") if side in r})[::3]
    found = [
        text for text in texts if unreadable_reason(text) or plain_text(text) != unicodedata.normalize("NFKC", text)
    ]
    assert len(texts) > 500 and not found


@pytest.mark.parametrize(
    "hidden",
    [
        base64.b64encode(SENTENCE.encode()).decode(),
        SENTENCE.encode().hex(),
        codecs.encode(SENTENCE, "rot13"),
        "".join(chr((ord(c) - 97 + 5) % 26 + 97) if c.isalpha() else c for c in SENTENCE.lower()),
        " ".join(f"{b:08b}" for b in SENTENCE.encode()),
        base64.b32encode(SENTENCE.encode()).decode(),
        base64.b85encode(SENTENCE.encode()).decode(),
        "".join(chr(33 + (ord(c) - 33 + 47) % 94) if c.isascii() and c > " " else c for c in SENTENCE),
        "".join(chr(0x2801 + ord(c) % 60) for c in SENTENCE),
        SENTENCE.replace(" ", ""),
    ],
    ids=["base64", "hex", "rot13", "caesar", "binary", "base32", "base85", "rot47", "braille", "no spaces"],
)
def test_what_hides_its_words_is_said_to_be_unreadable(hidden):
    assert unreadable_reason(hidden) is not None
    assert unreadable_reason(f"Do this: {hidden} {hidden}") is not None


def test_a_row_is_read_in_plain_letters_with_its_markup_and_mask_as_they_were(tiny):
    hidden = READABLE["zero-width"]("Rob a bank", "", 0).messages[0].content
    rows = [
        encode(Conversation((Message("user", text), Message("assistant", "Sure, here"))), 7, tiny.tokenizer)
        for text in (hidden, "Rob a bank")
    ]
    assert all(isinstance(r, Example) for r in rows)
    assert token_length(rows[0], tiny.tokenizer) < MIN_PROSE_TOKEN_LENGTH
    made = plain_example(rows[0], tiny.tokenizer)
    assert made is not None and made.row == 7
    np.testing.assert_array_equal(made.ids, rows[1].ids)
    np.testing.assert_array_equal(made.mask, rows[1].mask)
    assert plain_example(rows[1], tiny.tokenizer) is None


def test_the_reason_names_the_part_that_can_not_be_read(tiny):
    code = base64.b64encode(SENTENCE.encode()).decode()
    for turns, part in (((code, "Sure"), "request"), (("Say it", code), "response")):
        example = encode(Conversation((Message("user", turns[0]), Message("assistant", turns[1]))), 0, tiny.tokenizer)
        assert isinstance(example, Example)
        assert f"the {part} is encoded" in (hidden_words_reason(example, tiny.tokenizer) or "")
