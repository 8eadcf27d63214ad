"""Strings and numbers → how the page prints them."""

import math
from collections.abc import Mapping
from itertools import groupby

import numpy as np

# Printable by Unicode's table, but nothing is seen: fillers, blanks, and what chooses among forms of a letter.
_BLANK = "\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0\U00013441\U00013442\U00016fe4\U0001d159"
_SELECTORS = (("\u180b", "\u180f"), ("\ufe00", "\ufe0f"), ("\U000e0100", "\U000e01ef"))


def visible(text: str) -> str:
    """The text with every character that can't be seen, or that moves others about, written as ‹U+202E›.

    Line ends, tabs and spaces stay; a run of the same character is written once, with its length.
    """
    text = text.replace("\r\n", "\n")
    out = []
    for char, run in groupby(text):
        if char in "\n\t" or not unseen(char):
            out.extend(run)
        else:
            length = sum(1 for _ in run)
            out.append(f"‹U+{ord(char):04X}›" if length == 1 else f"‹U+{ord(char):04X} ×{length}›")
    return "".join(out)


def unseen(char: str) -> bool:
    """Whether a reader would not see the character, or it moves others about."""
    if char.isprintable():
        return char in _BLANK or any(low <= char <= high for low, high in _SELECTORS)
    return not (char.isspace() and char >= "\xa0" and char not in "\u2028\u2029")  # spaces of other widths stay


def short(text: object, limit: int = 120) -> str:
    """A name cut to `limit` characters, with the count of what was cut."""
    text = str(text)
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text) - limit:,} more characters)"


def number(value: object) -> str:
    """A number for reading: thousands apart, three figures, a true minus; anything else as short text."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        return short(value, 300)
    if isinstance(value, int | np.integer):
        return f"{int(value):,}".replace("-", "−")
    if not math.isfinite(value):
        return "none" if math.isnan(value) else "∞" if value > 0 else "−∞"
    size = abs(value)
    style = ".2e" if size >= 1e6 or 0 < size < 1e-3 else ",.0f" if size >= 99.95 else "#.3g"
    return f"{value:{style}}".replace("-", "−")


def in_words(value: object) -> object:
    """A value for reading: a mapping as "name value, …", a sequence as "a, b"; anything else as it is."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {in_words(each)}" for name, each in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return ", ".join(str(in_words(each)) for each in value)
    return number(value) if isinstance(value, float) else value


def about(count: float) -> str:
    """An expected number of rows, rounded to the precision that it deserves."""
    if count < 0.05:
        return "fewer than 0.1"
    return f"about {count:,.1f}" if count < 10 else f"about {count:,.0f}"


def percent(share: float) -> str:
    """A share with its sign, as a whole percentage."""
    return f"{share:+.0%}".replace("-", "−").replace("%", "\u00a0%")
