"""Undoes disguises of letters, so that a text has the words that a person would read.

Each function undoes one kind of disguise and leaves other texts unchanged. The plain text is scored in addition to the
original, so a wrong guess can't hide anything.
"""

import html
import re
import unicodedata
from urllib.parse import unquote

from gradshield.scoring.intent.letter_pairs import letter_pair_log2

# Letters of other scripts that look like Latin ones (after NFKC and in lower or upper case).
LOOKALIKES = str.maketrans(
    "авсԁеѕіјӏոорԛгтԝхузьһκνρτυχαοιεωβγηАВСЕНІЈКМОРЅТХУΑΒΕΖΗΙΚΜΝΟΡΤΥΧ",
    "abcdesijlnopqrtwxy3bhkvptuxaoiewbynABCEHIJKMOPSTXYABEZHIKMNOPTYX",
)
# Letters of no script of their own: small capitals.
STYLED = str.maketrans("ɑɡɩᴀʙᴄᴅᴇꜰғɢʜɪᴊᴋʟᴍɴᴏᴘǫʀꜱᴛᴜᴠᴡʏᴢ", "agiabcdeffghijklmnopqrstuvwyz")
UPSIDE_DOWN = str.maketrans("ɐqɔpǝɟƃɥᴉıɾʞɯuodbɹʇnʌʍʎ", "abcdefghiijkmnopqrtuvwy")  # other letters look the same
# Regional indicators, and letters in black circles and squares, which NFKC keeps.
STYLED |= {first + n: ord("a") + n for first in (0x1F1E6, 0x1F150, 0x1F170) for n in range(26)}
TAGS = {0xE0000 + n: chr(n) for n in range(32, 127)}  # invisible, but a tokenizer reads them
LEET = str.maketrans("0134578@$!|", "oieastbasil")
ESCAPED = re.compile(r"\\u([0-9a-fA-F]{4})|\\x([0-9a-fA-F]{2})")
ASCII = r"(?:3[2-9]|[4-9]\d|1[01]\d|12[0-6])"
NUMBERS = re.compile(rf"(?<![\d.])(?:{ASCII}[ ,;]+){{9,}}{ASCII}(?![\d.])")
# Single letters with one to five characters between them that are neither letters nor digits.
SPACED = re.compile(r"(?<![^\W_])[^\W\d_](?:[\W_]{1,5}[^\W\d_](?![^\W_])){8,}")
# Eight words or more with signs or ends of lines between each two.
APART = re.compile(
    r"(?<![^\W\d_])[^\W\d_]++(?:(?!,? [^\W\d_]|['’_-][^\W\d_])[\W\d_]{1,12}+[^\W\d_]++){7,}"  # linear in the text
)
ENGLISH = frozenset(("the", "and", "of", "for", "with", "how", "that", "this", "your", "you", "is", "are", "or"))
MIN_ENGLISH = 1 / 15  # share of such words in a text that is in English
MANY_MARKS = 1 / 6  # marks a letter: English has next to none
MIN_REVERSAL_GAIN = 0.7  # bits a pair of letters by which turning a text round must make it more like a language
MIN_LETTERS = 24  # letters that say which way a text goes


def plain_text(text: str) -> str:
    """`text` with hidden letters made plain; the same text where there are none."""
    for undo in (
        _escapes,
        _invisible,
        _lookalikes,
        _separated,
        _words_apart,
        _hyphenated,
        _doubled,
        _mixed_case,
        _leetspeak,
        _undo_reversal,
    ):
        text = undo(text)
    return text


def _escapes(text: str) -> str:
    """HTML entities, percent signs, backslashes and lists of ASCII numbers that stand for letters."""
    if text.count("&#") > 4:
        text = html.unescape(text)
    if len(re.findall("%[0-9a-fA-F]{2}", text)) > 4:
        text = unquote(text)
    if len(ESCAPED.findall(text)) > 4:
        text = ESCAPED.sub(lambda m: chr(int(m[1] or m[2], 16)), text)
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # two halves make one character
    return NUMBERS.sub(lambda m: "".join(chr(int(n)) for n in re.findall(r"\d+", m[0])), text)


def _invisible(text: str) -> str:
    """Compatibility forms, invisible characters, and marks heaped on letters, or on many letters of English words."""
    text = "".join(c for c in unicodedata.normalize("NFKC", text.translate(TAGS)) if _visible(c))
    split = unicodedata.normalize("NFD", text)
    marks, letters = (sum(unicodedata.category(c)[0] == kind for c in split) for kind in "ML")
    latin = sum("a" <= c <= "z" for c in split.lower())
    bare = "".join(c for c in split if unicodedata.category(c) != "Mn")
    many = marks > letters / 2 or (marks > MANY_MARKS * letters and _english(bare))
    return bare if latin > letters / 2 and many else text


def _english(text: str) -> bool:
    words = re.findall(r"[^\W\d_]+", text.lower())
    return sum(word in ENGLISH for word in words) > MIN_ENGLISH * len(words)


def _visible(c: str) -> bool:
    return unicodedata.category(c) != "Cf" and not 0xFE00 <= ord(c) <= 0xFE0F


def _lookalikes(text: str) -> str:
    if len(re.findall("[ɐɔǝɟɥᴉɹʇʌʍʎ]", text)) > len(text) / 5:
        text = text.translate(UPSIDE_DOWN)[::-1]
    text = text.translate(STYLED)
    mixed = any(re.search("[A-Za-z]", w) and w.translate(LOOKALIKES) != w for w in _words(text))
    return text.translate(LOOKALIKES) if mixed else text


def _separated(text: str) -> str:
    """Letters with something between each two of them, and words with nothing but underscores between them."""
    if sum(len(m[0]) for m in SPACED.finditer(text)) > len(text) / 3:
        text = re.sub(r"\s{2,}", " ", SPACED.sub(_without_separators, text))
    if text.count("_") >= 4 and not re.search(r"[\s/]", text.strip()):
        text = text.replace("_", " ")
    return text


def _without_separators(match: re.Match[str]) -> str:
    """The letters without their usual separator."""
    between = re.findall(r"[\W_]+", match[0])
    usual = max(sorted(set(between)), key=between.count)

    def gap(found: re.Match[str]) -> str:
        if found[0] == usual:
            return ""
        if set(found[0][::2]) == {usual}:  # it also parts the characters of a longer gap
            return found[0][1::2]
        return found[0].replace(usual, "") or " "

    return re.sub(r"[\W_]+", gap, match[0])


def _words_apart(text: str) -> str:
    """Every word in quotes, on a line of its own, or with signs around it."""
    if sum(len(m[0]) for m in APART.finditer(text)) <= len(text) / 3:
        return text
    return APART.sub(_with_blanks, text)


def _with_blanks(match: re.Match[str]) -> str:
    """The words separated by blanks, if nearly all separators are the same up to numbers."""
    between = [re.sub(r"\d+|[,.;]", "", gap) for gap in re.findall(r"[\W\d_]+", match[0])]
    same = max(map(between.count, set(between)))
    return re.sub(r"[\W\d_]+", " ", match[0]) if same > 0.8 * len(between) else match[0]


def _hyphenated(text: str) -> str:
    """Hy-phens be-tween syl-la-bles."""
    words = _words(text)
    parted = sum(bool(re.search(r"[^\W\d_][-\u00ad‧·][^\W\d_]", word)) for word in words)
    return re.sub(r"(?<=[^\W\d_])[-\u00ad‧·](?=[^\W\d_])", "", text) if parted > max(3, len(words) / 4) else text


def _doubled(text: str) -> str:
    """Every letter written twice."""
    twice = re.fullmatch(r"(?:([^\W_])\1|[\W_])+", text)
    return re.sub(r"([^\W_])\1", r"\1", text) if twice and len(text) >= MIN_LETTERS else text


def _mixed_case(text: str) -> str:
    """CaPiTaLs InSiDe WoRdS, or at theiR enD."""
    words = re.findall(r"[^\W\d_]{5,}", text)
    mixed = sum(len(re.findall(r"[a-z][A-Z]", word)) > 1 or bool(re.fullmatch("[a-z]+[A-Z]", word)) for word in words)
    return text.lower() if len(words) > 2 and mixed > len(words) / 2 else text


def _leetspeak(text: str) -> str:
    words = _words(text)
    leet = [w for w in words if re.search(r"[A-Za-z][01345787@$!|]+[A-Za-z]|[01345787@$][A-Za-z]{2}", w)]
    if len(leet) < 3 or len(leet) <= len(words) / 4:
        return text
    return re.sub(r"\S+", lambda m: m[0].translate(LEET) if _words(m[0]) else m[0], text)


def _undo_reversal(text: str) -> str:
    """Text written backwards, as a whole or word by word (then the capital of its first word ends that word)."""
    words = re.findall("[a-z]+", text.lower())
    if (
        sum(map(len, words)) < MIN_LETTERS
        or letter_pair_log2([w[::-1] for w in words]) - letter_pair_log2(words) < MIN_REVERSAL_GAIN
    ):
        return text
    by_word = re.match(r"\W*[a-z]+[A-Z](?![A-Za-z])", text)
    return re.sub(r"\S+", lambda m: m[0][::-1], text) if by_word else text[::-1]


def _words(text: str) -> list[str]:
    """The words of the text, split at blanks; each holds a letter."""
    return [word for word in text.split() if re.search(r"[^\W\d_]", word)]
