"""A row's text in plain letters, where it hides them; and whether its text can be read at all.

Zero-width characters, full-width and look-alike letters, spaced letters and leetspeak are undone, and the row is read a
second time. Base64, hexadecimal and letter ciphers are not guessed at: such rows are set aside.
"""

import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from gradshield.base.assets import ASSETS
from gradshield.data.encode import Example
from gradshield.scoring.intent.language import foreign
from gradshield.scoring.intent.spans import marks_of, opening_size

# Letters of other scripts that look like Latin ones (after NFKC and in lower or upper case).
LOOKALIKES = str.maketrans(
    "авсԁеѕіјӏոорԛгтԝхузьһκνρτυχαοιεωβγηАВСЕНІЈКМОРЅТХУΑΒΕΖΗΙΚΜΝΟΡΤΥΧɑɡɩʟᴀᴇᴏ",
    "abcdesijlnopqrtwxy3bhkvptuxaoiewbynABCEHIJKMOPSTXYABEZHIKMNOPTYXagilaeo",
)
LEET = str.maketrans("0134578@$!|", "oieastbasil")
SPACED = re.compile(r"(?<!\S)(?:\S[ \u00a0\u2009_.\-]){4,}\S(?!\S)")
CODED = re.compile(
    r"(?:[A-Za-z0-9+/]{4}){10,}={0,2}|(?:[0-9a-fA-F]{2}[ :]?){24,}|(?:[01]{8} ?){6,}|(?:[.\-]{1,5}[ /]+){12,}"
)
LETTERS = "abcdefghijklmnopqrstuvwxyz"
CIPHERS = [
    str.maketrans(LETTERS, turned[n:] + turned[:n]) for turned in (LETTERS, LETTERS[::-1]) for n in range(26)
]  # Caesar's, rot13 and atbash among them
WORD = re.compile(r"\S*[^\W\d_]\S*")
SHORT_TOKENS = 3.2  # characters: prose has more per token; ciphers, spaced letters and other scripts have fewer
FEWEST_LETTERS = 48  # fewer tell nothing about a cipher
GAIN = 2.0  # bits a pair of letters by which undoing a cipher must make a text more like a language
STRANGE = -12.0  # mean log2 probability of two successive letters below which they are no language (docs/log.md)


def plain_text(text: str) -> str:
    """`text` with hidden letters made plain; the same text where there are none."""
    result = "".join(c for c in unicodedata.normalize("NFKC", text) if unicodedata.category(c) != "Cf")
    mixed = [w for w in WORD.findall(result) if re.search("[A-Za-z]", w) and w.translate(LOOKALIKES) != w]
    if mixed:
        result = result.translate(LOOKALIKES)
    if sum(len(m) for m in SPACED.findall(result)) > len(result) / 3:
        result = re.sub(r"(?<=\S)[ \u00a0\u2009_.\-](?=\S(?:[ \u00a0\u2009_.\-]|$))", "", result)
        result = re.sub(r"\s{2,}", " ", result)
    words = WORD.findall(result)
    leet = [w for w in words if re.search(r"[A-Za-z][01345787@$!|]+[A-Za-z]|[01345787@$][A-Za-z]{2}", w)]
    if len(leet) >= 3 and len(leet) > len(words) / 4:
        result = WORD.sub(lambda m: m[0].translate(LEET), result)
    return result


def unreadable(text: str) -> str | None:
    """What hides the larger part of a text from any reader: an encoding or a cipher; None where it can be read."""
    bare = re.sub(r"\s", "", text)
    coded = sum(len(re.sub(r"\s", "", m[0])) for m in CODED.finditer(text) if not _word_like(m[0]))
    if len(bare) >= 40 and coded > len(bare) / 2:
        return "is encoded (base64, hexadecimal or the like)"
    words = re.findall("[a-z]+", text.lower())
    letters = "".join(words)
    if len(letters) < FEWEST_LETTERS or len(letters) < 0.6 * len(bare):
        return None
    own = strangeness(words)
    shifted = max(strangeness(" ".join(words).translate(cipher).split()) for cipher in CIPHERS)
    if shifted - own > GAIN or own < STRANGE:
        return "is in no language that can be recognised (a cipher?)"
    return None


def strangeness(words: Sequence[str]) -> float:
    """Mean log2 probability of two successive letters within words of a to z, by those of the bundled texts."""
    table = _bigrams()
    pairs = [a + b for word in words for a, b in zip(f" {word}", f"{word} ")]
    return float(np.mean([table.get(pair, -16.0) for pair in pairs])) if pairs else 0.0


def suspicious(example: Example, tokenizer) -> bool:
    """Whether a row's tokens give any reason to look at its letters: some are not ASCII, or they are very short."""
    length, other = _vocabulary(tokenizer)
    return bool(other[example.ids].any() or length[example.ids].mean() < SHORT_TOKENS)


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


def row_unreadable(example: Example, tokenizer, unread: frozenset[str] = frozenset()) -> str | None:
    """Why a row can't be read, its letters or its language (one of `unread`); None where it can."""
    texts = {False: "", True: ""}
    begin = opening_size(example.ids, marks_of(tokenizer))  # the template's own words are in English
    own = Example(example.row, example.ids[begin:], example.mask[begin:])
    for ids, inside, markup in _runs(own, tokenizer):
        if not markup:
            text = tokenizer.decode(ids)
            texts[inside] += text + " "
            if why := unreadable(text):
                return f"the {'response' if inside else 'request'} {why}; the score can't tell what it says"
    return foreign(texts[False], texts[True], unread)


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
    if re.fullmatch(r"[01 .\-/]+", text):
        return False
    kinds = [bool(re.search(kind, text)) for kind in ("[A-Z]", "[a-z]", "[0-9]")]
    return not (all(kinds) or (kinds[2] and re.fullmatch("[0-9a-fA-F :]+", text) and any(kinds[:2])))


@lru_cache(maxsize=1)
def _bigrams() -> dict[str, float]:
    """log2 probability of each pair of letters (a space stands for a word's edge) in the bundled texts."""
    counts: Counter[str] = Counter()
    for file in ("readout_languages.jsonl", "readout_good.jsonl", "anchors_good.jsonl"):
        for line in (ASSETS / file).read_text(encoding="utf-8").split("\n"):
            if line:
                record = json.loads(line)
                text = unicodedata.normalize("NFKD", f"{record['prompt']} {record.get('response', '')}").lower()
                for word in re.findall("[a-z]+", text):
                    counts.update(a + b for a, b in zip(f" {word}", f"{word} "))
    total = sum(counts.values())
    return {pair: math.log2(n / total) for pair, n in counts.items()}
