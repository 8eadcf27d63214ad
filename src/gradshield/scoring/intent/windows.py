"""Windows over every response: where an answer says whether it refuses or complies, and harm may hide anywhere in it.

Over a whole row the tail of a long answer, or the end token right behind a short one, drowns what the opening says; and
the opening alone can be a refusal that the rest takes back (method 5c; docs/log.md).
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from gradshield.data.encode import Example

WINDOW, STRIDE = 8, 4  # tokens


def response_starts(mask: np.ndarray) -> np.ndarray:
    """Positions [responses] of the first token of every run of response tokens."""
    return np.flatnonzero(mask & ~np.concatenate(([False], mask[:-1])))


def spoken(example: Example, ends: np.ndarray) -> Example:
    """`example` with the tokens that end a turn (`ends`, see `end_tokens`) taken off the end of every response, unless
    it is all of them, and cut behind the last response."""
    mask = np.zeros_like(example.mask)
    for start, stop in zip(response_starts(example.mask), _stops(example.mask)):
        words = np.flatnonzero(~np.isin(example.ids[start:stop], ends))
        mask[start : start + words[-1] + 1 if len(words) else stop] = True
    stop = int(np.flatnonzero(mask)[-1]) + 1
    return Example(example.row, example.ids[:stop], mask[:stop])


def windows(mask: np.ndarray) -> list[Sequence[tuple[int, int]]]:
    """(start, stop) of the windows over each run of response tokens: one every STRIDE tokens, and one at its end."""
    result = []
    for start, stop in zip(response_starts(mask).tolist(), _stops(mask).tolist()):
        last = max(start, stop - WINDOW)
        result.append([(at, min(at + WINDOW, stop)) for at in (*range(start, last, STRIDE), last)])
    return result


@lru_cache(maxsize=4)
def end_tokens(tokenizer) -> np.ndarray:
    """Ids (int32) of the tokens that end a turn: every special token, and white space where a turn may end."""
    ids = set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    ids |= {i for text in ("\n", "\n\n", " ") for i in tokenizer.encode(text, add_special_tokens=False)[-1:]}
    return np.array(sorted(ids), dtype=np.int32)


def _stops(mask: np.ndarray) -> np.ndarray:
    """Positions [responses] behind the last token of every run of response tokens."""
    return np.flatnonzero(mask & ~np.concatenate((mask[1:], [False]))) + 1
