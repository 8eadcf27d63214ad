"""The opening of every response: where an answer says whether it refuses or complies.

Over a whole row the tail of a long answer, or the end token right behind a short one, drowns what the opening says
(method 5c). Cut rows are also cheaper: nothing behind the last opening is computed.
"""

import numpy as np

from gradshield.data.encode import Example


def response_starts(mask: np.ndarray) -> np.ndarray:
    """Positions [responses] of the first token of every run of response tokens."""
    return np.flatnonzero(mask & ~np.concatenate(([False], mask[:-1])))


def opening(example: Example, tokens: int, ends: frozenset[int]) -> Example:
    """`example` with the mask on the first `tokens` of every response, cut behind the last of them.

    Tokens at the end of an opening that end a turn (`ends`, see `end_tokens`) are left out, unless it is all of them.
    """
    mask = np.zeros_like(example.mask)
    for start in response_starts(example.mask):
        window = example.mask[start : start + tokens]
        stop = start + (len(window) if window.all() else int(np.argmin(window)))
        words = np.flatnonzero(~np.isin(example.ids[start:stop], list(ends)))
        mask[start : start + words[-1] + 1 if len(words) else stop] = True
    stop = int(np.flatnonzero(mask)[-1]) + 1
    return Example(example.row, example.ids[:stop], mask[:stop])


def end_tokens(tokenizer) -> frozenset[int]:
    """Ids of the tokens that end a turn: every special token, and white space in the places where a turn ends."""
    ids = set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    ids |= {i for text in ("\n", "\n\n", " ") for i in tokenizer.encode(text, add_special_tokens=False)[-1:]}
    return frozenset(ids)
