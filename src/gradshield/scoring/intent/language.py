"""Which languages the default score can read with a model, and which language a text is in.

A model that was trained on English separates harmful from harmless requests in German hardly better than chance. Rows
in such a language are set aside, harmful or not, because their score would be a guess. So are rows in a language that
was not tested, unless the model reads all that were.
"""

import re
import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from gradshield.scoring.intent.corpus import ANCHOR_ROWS, anchor_records, language_answers, language_records

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

MIN_READING_AUROC = 0.9  # out-of-fold AUROC of harmful over harmless requests in a language (docs/log.md)
QUOTED = re.compile(r'"[^"]*"|“[^”]*”|„[^“”]*[“”]|«[^»]*»|「[^」]*」|`[^`]*`')
MIN_LETTERS = 24  # a text with fewer is in no language for sure
MIN_KNOWN_WORDS = 0.15  # share of a text's words that must stand in bundled texts of its language (docs/log.md)
UNSPACED = ("ja", "zh")  # languages without spaces between words
UNTESTED = "another language"


def reading_ability(asked: Sequence[tuple[str, bool, float]]) -> np.ndarray:
    """AUROC [languages, in the order of `languages()`] of harmful over harmless requests; NaN where either is missing.

    `asked` holds each request's language, whether it is harmful, and its out-of-fold topic.
    """
    from sklearn.metrics import roc_auc_score

    found = []
    for name in languages():
        harmful, topic = [h for n, h, _ in asked if n == name], [t for n, _, t in asked if n == name]
        found.append(float(roc_auc_score(harmful, topic)) if len(set(harmful)) == 2 else np.nan)
    return np.array(found)


def unread_languages(ability: np.ndarray) -> frozenset[str]:
    """The languages that are read too poorly. English is always read: the alignment check asks in it."""
    return frozenset(n for n, value in zip(languages(), ability) if value < MIN_READING_AUROC and n != "en")


def language_reason(request: str, response: str, unread: frozenset[str]) -> str | None:
    """Why a row can't be read: its request and its response are in languages of `unread`. One that is too short to tell
    counts as the other, and what a request quotes is not its own language."""
    found = {language_of(text) for text in (QUOTED.sub(" ", request), response)} - {None} if unread else set()
    if not found or not found <= unread | {UNTESTED}:
        return None
    if found == {UNTESTED}:
        return f"it is in none of the languages that were tested ({', '.join(languages())})"
    return f"the model reads its language ({', '.join(sorted(map(str, found)))}) too poorly to tell what it asks"


@cache
def languages() -> tuple[str, ...]:
    """The ISO 639-1 codes of the languages of the bundled requests."""
    return tuple(sorted({record["language"] for record in language_records()}))


def language_of(text: str) -> str | None:
    """The likeliest of `languages()`, UNTESTED where hardly a word is known in it, or None where there are too few
    letters to tell."""
    plain = _letters(text)
    if not plain or (len(plain.replace(" ", "")) < MIN_LETTERS and plain.isascii()):
        return None
    found = str(_classifier().predict([plain])[0])
    known = np.mean([word in _words()[found] for word in plain.split()])
    return found if found in UNSPACED or known >= MIN_KNOWN_WORDS else UNTESTED


def _letters(text: str) -> str:
    return " ".join(re.findall(r"[^\W\d_]+", unicodedata.normalize("NFC", text[:2000]).lower()))


@cache
def _words() -> dict[str, frozenset[str]]:
    """The words of the bundled texts in each language."""
    texts = [(record["prompt"], record["language"]) for record in language_records()]
    texts += [(record["response"], record["language"]) for record in language_answers()]
    texts += [(f"{row['prompt']} {row['response']}", "en") for kind in ANCHOR_ROWS for row in anchor_records(kind)]
    return {
        name: frozenset(word for text, language in texts if language == name for word in _letters(text).split())
        for name in languages()
    }


@cache
def _classifier() -> "Pipeline":
    """Naive Bayes on character n-grams of the bundled texts."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.naive_bayes import MultinomialNB
    from sklearn.pipeline import make_pipeline

    texts = [(record["prompt"], record["language"]) for record in language_records()]
    texts += [(f"{row['prompt']} {row['response']}", "en") for row in anchor_records("good")[::4]]
    pieces = CountVectorizer(analyzer="char_wb", ngram_range=(1, 4))
    classifier = make_pipeline(pieces, MultinomialNB(alpha=0.1, fit_prior=False))
    return classifier.fit([_letters(text) for text, _ in texts], [language for _, language in texts])
