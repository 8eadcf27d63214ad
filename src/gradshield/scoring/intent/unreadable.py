"""Whether the words of a row can be read, by its letters, its encoding and its language.

A row with hidden letters is scored a second time in plain letters. Encodings, ciphers and languages that the model does
not read are not decoded: such rows are set aside.
"""

import re
import unicodedata
from functools import lru_cache

import numpy as np

from gradshield.data.encode import Example
from gradshield.scoring.intent.language import language_reason
from gradshield.scoring.intent.letter_pairs import letter_pair_log2
from gradshield.scoring.intent.plain import plain_text
from gradshield.scoring.intent.spans import marks_of, opening_size

ENCODED_TEXT = re.compile(
    r"(?:[A-Za-z0-9+/]{4}){10,}={0,2}|(?:[A-Z2-7]{8}){4,}=*|(?:[0-9a-fA-F]{2}[ :]?){24,}|(?:[01]{8} ?){6,}"
    r"|(?:[.\-]{1,5}[ /]+){12,}"
)
# base85, but no address: capitals, small letters, digits and four other characters
BASE85_TEXT = re.compile(
    r"(?<!\S)(?!\S*(?:://|www\.))(?=\S*[A-Z])(?=\S*[a-z])(?=\S*\d)(?:\w*[^\w\s]){4}[!-~]{30,}(?!\S)"
)
ALPHABET = "abcdefghijklmnopqrstuvwxyz"
CIPHERS = [
    str.maketrans(ALPHABET, turned[n:] + turned[:n]) for turned in (ALPHABET, ALPHABET[::-1]) for n in range(26)
]  # Caesar's, rot13 and atbash among them
ROT47 = str.maketrans({chr(33 + n): chr(33 + (n + 47) % 94) for n in range(94)})
MIN_PROSE_TOKEN_LENGTH = (
    3.2  # characters: prose has more per token; ciphers, spaced letters and other scripts have fewer
)
MIN_NATIVE_TOKEN_LENGTH = 4.0  # characters: a language that a tokenizer was made for has more per token
MIN_CHARACTERS = 40  # characters; fewer are not judged
MIN_CIPHER_LETTERS = 48  # fewer tell nothing about a cipher
MIN_DECIPHERING_GAIN = 2.0  # bits a pair of letters by which undoing a cipher must make a text more like a language
MAX_WORD_LENGTH = 18  # letters of a mean word from which the spaces between words are missing
MIN_PROSE_LOG2 = -8.2  # the same of prose, at least
MIN_LANGUAGE_LOG2 = (
    -12.0
)  # mean log2 probability of two successive letters below which they are no language (docs/log.md)


def unreadable_reason(text: str) -> str | None:
    """What hides the larger part of a text from any reader: an encoding or a cipher; None where it can be read."""
    bare = re.sub(r"\s", "", text)
    if len(bare) < MIN_CHARACTERS:
        return None
    coded = sum(len(re.sub(r"\s", "", m[0])) for m in ENCODED_TEXT.finditer(text) if not _word_like(m[0]))
    if max(coded, sum(len(m[0]) for m in BASE85_TEXT.finditer(text))) > len(bare) / 2:
        return "is encoded (base64, hexadecimal or the like)"
    if sum(unicodedata.category(c) in ("So", "Co", "Cn") for c in bare) > len(bare) / 2:
        return "is written in symbols"
    words = re.findall("[a-z]+", text.lower())
    letters = "".join(words)
    if (
        len(letters) >= MIN_CIPHER_LETTERS
        and len(letters) > 0.6 * len(bare)
        and len(letters) > MAX_WORD_LENGTH * len(words)
    ):
        return "has no spaces between its words"
    turned = re.findall("[a-z]+", text.translate(ROT47).lower())
    if (
        len(letters) < 0.5 * len(bare)
        and sum(map(len, turned)) > 0.85 * len(bare)
        and letter_pair_log2(turned) > MIN_PROSE_LOG2
    ):
        return "is in a cipher (rot47)"
    if len(letters) < MIN_CIPHER_LETTERS or len(letters) < 0.6 * len(bare):
        return None
    own = letter_pair_log2(words)
    shifted = max(letter_pair_log2(" ".join(words).translate(cipher).split()) for cipher in CIPHERS)
    if shifted - own > MIN_DECIPHERING_GAIN or own < MIN_LANGUAGE_LOG2:
        return "is in no language that can be recognised (a cipher?)"
    return None


def token_length(example: Example, tokenizer) -> float:
    """Mean characters of the row's own tokens, the template's opening left out; 0 where some are not ASCII."""
    length, other = _vocabulary(tokenizer)
    own = example.ids[opening_size(example.ids, marks_of(tokenizer)) :]
    return 0.0 if other[own].any() else float(length[own].mean())


def plain_example(example: Example, tokenizer) -> Example | None:
    """The row with its words in plain letters, or None where they are already. Markup stays as it is."""
    pieces, changed = [], False
    for ids, inside, markup in _runs(example, tokenizer):
        text = "" if markup else tokenizer.decode(ids)
        made = plain_text(text)
        if made != text:
            ids, changed = np.array(tokenizer.encode(made, add_special_tokens=False) or ids, dtype=np.int32), True
        pieces.append((ids, np.full(len(ids), inside)))
    if not changed:
        return None
    made, mask = (np.concatenate(part) for part in zip(*pieces))
    return Example(example.row, made, mask)


def hidden_words_reason(example: Example, tokenizer) -> str | None:
    """What hides the words of a row's request or response; None where nothing does."""
    for ids, inside, markup in _runs(example, tokenizer):
        if not markup and (why := unreadable_reason(tokenizer.decode(ids))):
            return f"the {'response' if inside else 'request'} {why}; the score can't tell what it says"
    return None


def foreign_language_reason(example: Example, tokenizer, unread: frozenset[str]) -> str | None:
    """Why a row can't be read where it is in a language of `unread`; else None."""
    sides = {False: "", True: ""}
    begin = opening_size(example.ids, marks_of(tokenizer))  # the template's own words are in English
    for ids, inside, markup in _runs(Example(example.row, example.ids[begin:], example.mask[begin:]), tokenizer):
        if not markup:
            sides[inside] += tokenizer.decode(ids) + " "
    return language_reason(sides[False], sides[True], unread)


def _runs(example: Example, tokenizer) -> list[tuple[np.ndarray, bool, bool]]:
    """(ids, whether they are response tokens, whether they are markup) of each run of such tokens."""
    markup = np.isin(example.ids, list(tokenizer.all_special_ids) + list(tokenizer.added_tokens_decoder))
    state = example.mask * 2 + markup
    cuts = np.flatnonzero(np.diff(state)) + 1
    parts = zip(np.split(example.ids, cuts), np.split(state, cuts))
    return [(ids, bool(s[0] & 2), bool(s[0] & 1)) for ids, s in parts]


@lru_cache(maxsize=4)
def _vocabulary(tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """(length in characters, whether it holds others than ASCII) [vocabulary] of each token."""
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    words = [
        re.sub("[\u0120\u2581\u010a]", " ", token or "") for token in tokens
    ]  # blanks of byte-level BPE, SentencePiece
    return np.array([len(w) for w in words]), np.array([not w.isascii() for w in words])


def _word_like(text: str) -> bool:
    """Whether a run of an encoding's letters is rather a long word, a path or a number."""
    if re.fullmatch(r"[01 .\-/]+|(?=[A-Z]*[2-7])[A-Z2-7]+=*", text):
        return False
    kinds = [bool(re.search(kind, text)) for kind in ("[A-Z]", "[a-z]", "[0-9]")]
    return not (all(kinds) or (kinds[2] and re.fullmatch("[0-9a-fA-F :]+", text) and any(kinds[:2])))
