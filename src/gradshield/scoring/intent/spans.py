"""The parts of a row that the default score reads: its responses, and the context of each.

A response is a run of response tokens. Special tokens inside a run split it, since chat markup in a message works as
its tokens do. The context of a response is everything since the previous one, and the system prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from gradshield.base.errors import UserError
from gradshield.data.encode import Example, encode
from gradshield.data.formats import Conversation, Message


@dataclass(frozen=True)
class Response:
    """Positions of a response, and of its context: the turns that it answers."""

    context: np.ndarray  # int [C], C ≥ 1, ascending
    start: int
    stop: int


@dataclass(frozen=True)
class Marks:
    """The tokens that a tokenizer and its template write around texts."""

    special: frozenset[int]  # tokens that stand for markup, never for words
    ends: np.ndarray  # int32: tokens that say nothing at the end of a response
    opening: tuple[int, ...]  # ids that every row without a system prompt of its own begins with
    header: tuple[int, ...]  # ids between a system prompt's last token and the first user message; () if unknown


def response_starts(mask: np.ndarray) -> np.ndarray:
    """Positions [runs] of the first token of every run of response tokens."""
    return np.flatnonzero(mask & ~np.concatenate(([False], mask[:-1])))


def response_stops(mask: np.ndarray) -> np.ndarray:
    """Positions [runs] behind the last token of every run of response tokens."""
    return np.flatnonzero(mask & ~np.concatenate((mask[1:], [False]))) + 1


def without_turn_ends(example: Example, ends: np.ndarray) -> Example:
    """`example` with the tokens that end a turn (`Marks.ends`) taken off the end of every response, unless it is all of
    them, and cut behind the last response."""
    mask = np.zeros_like(example.mask)
    for start, stop in zip(response_starts(example.mask), response_stops(example.mask)):
        words = np.flatnonzero(~np.isin(example.ids[start:stop], ends))
        mask[start : start + words[-1] + 1 if len(words) else stop] = True
    stop = int(np.flatnonzero(mask)[-1]) + 1
    return Example(example.row, example.ids[:stop], mask[:stop])


def responses(example: Example, marks: Marks) -> list[Response]:
    """The responses of a row as `without_turn_ends` leaves it, in order."""
    ids = example.ids
    text = opening_size(ids, marks)
    system = np.arange(text, _first_position(ids, marks.header))
    found, since = [], text
    for start, stop in zip(response_starts(example.mask).tolist(), response_stops(example.mask).tolist()):
        begin, before = start, len(found)
        inside = [at for at in range(start, stop) if int(ids[at]) in marks.special]
        for cut in [*inside, stop]:
            if cut > begin:
                found.append(Response(np.union1d(system, np.arange(min(since, begin - 1), begin)), begin, cut))
            begin = cut + 1
        if len(found) == before:  # nothing but special tokens
            found.append(Response(np.union1d(system, np.arange(min(since, start - 1), start)), start, stop))
        since = stop
    return found


def opening_size(ids: np.ndarray, marks: Marks) -> int:
    """Number of tokens at the start of a row that are the opening of all rows. Its words come after them."""
    same = min(len(ids), len(marks.opening))
    return int(np.argmin(np.append(ids[:same] == np.array(marks.opening[:same]), False)))


@lru_cache(maxsize=4)
def marks_of(tokenizer) -> Marks:
    """The marks of a tokenizer with its chat template."""
    special = {*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)}
    ends = set(special)
    ends |= {i for text in ("\n", "\n\n", " ") for i in tokenizer.encode(text, add_special_tokens=False)[-1:]}
    plain = [_encoded_turns(tokenizer, request) for request in ("Name a city", "Why does it rain?")]
    opening = _common_prefix(*plain)
    header: tuple[int, ...] = ()
    own = [_encoded_turns(tokenizer, "Name a city", system) for system in ("Be brief today", "Write like a poet.")]
    if own[0] and own[1]:
        behind = [ids[: _last_position(ids, plain[0][len(opening) :])] for ids in own]
        header = _common_prefix(behind[0][::-1], behind[1][::-1])[::-1]
    return Marks(frozenset(special), np.array(sorted(ends), dtype=np.int32), opening, header)


def _encoded_turns(tokenizer, request: str, system: str = "") -> tuple[int, ...]:
    turns = [Message("system", system)] if system else []
    turns += [Message("user", request), Message("assistant", "Yes")]
    try:
        example = encode(Conversation(tuple(turns)), 0, tokenizer)
    except UserError:
        return ()
    return () if isinstance(example, str) else tuple(example.ids.tolist())


def _common_prefix(one: Sequence[int], other: Sequence[int]) -> tuple[int, ...]:
    size = min(len(one), len(other))
    return tuple(one[: next((n for n in range(size) if one[n] != other[n]), size)])


def _last_position(ids: Sequence[int], part: Sequence[int]) -> int:
    """The last position of `part` in `ids`; 0 if there is none."""
    places = range(len(ids) - len(part), -1, -1)
    return next((n for n in places if tuple(ids[n : n + len(part)]) == tuple(part)), 0)


def _first_position(ids: np.ndarray, part: Sequence[int]) -> int:
    """Where `part` begins for the first time in `ids`; 0 if it does not, or is empty."""
    if not part:
        return 0
    for n in np.flatnonzero(ids == part[0]):
        if len(ids) >= n + len(part) and (ids[n : n + len(part)] == np.array(part)).all():
            return int(n)
    return 0
