"""How likely the pairs of letters of a text are in a language."""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from gradshield.base.assets import ASSETS
from gradshield.base.storage import read_jsonl


def letter_pair_log2(words: Sequence[str]) -> float:
    """Mean log2 probability of two successive letters within words of a to z, by those of the bundled texts."""
    table = _bigrams()
    pairs = [a + b for word in words for a, b in zip(f" {word}", f"{word} ")]
    return float(np.mean([table.get(pair, -16.0) for pair in pairs])) if pairs else 0.0


@lru_cache(maxsize=1)
def _bigrams() -> dict[str, float]:
    """log2 probability of each pair of letters (a space stands for a word's edge) in the bundled texts."""
    counts: Counter[str] = Counter()
    for file in ("readout_languages.jsonl", "readout_good.jsonl", "anchors_good.jsonl"):
        for record in read_jsonl(ASSETS / file):
            text = unicodedata.normalize("NFKD", f"{record['prompt']} {record.get('response', '')}").lower()
            for word in re.findall("[a-z]+", text):
                counts.update(a + b for a, b in zip(f" {word}", f"{word} "))
    total = sum(counts.values())
    return {pair: math.log2(n / total) for pair, n in counts.items()}
