"""A scorer over all examples: equal ones scored once, batches by token budget, every finished batch on disk.

The batches follow from the examples alone, and a batch is taken up whole or not at all: killed at any moment, the next
run ends with the same bytes.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gradshield.base.errors import UserError, out_of_memory
from gradshield.base.progress import progress
from gradshield.base.storage import append_line, read_lines
from gradshield.data.encode import Example
from gradshield.data.examples import token_counts
from gradshield.scoring.base import ScoreFunction, Scores

Batch = tuple[int, list[Example]]
Engine = Callable[[Iterable[Batch]], Iterator[tuple[int, Scores]]]
"""Numbered batches → each one's scores, in any order."""


def score(
    examples: Sequence[Example],
    scorer: ScoreFunction,
    *,
    batch_tokens: int,
    journal: Path | None = None,
    title: str = "scoring",
    engine: Engine | None = None,
) -> Scores:
    """The scores of the examples; a row that can't be scored has its reason, and NaN in every column.

    `journal` is a file that finished batches are appended to, and that an earlier run's are taken from. `engine` has
    the batches scored elsewhere, by the same scorer; the result is the same.
    Raises UserError when a single example does not fit into memory, or the journal's disk is full.
    """
    place, unique = _first_of_equals(examples)
    lengths = token_counts(examples)
    todo = [unique[batch] for batch in by_length(lengths[unique], batch_tokens)]
    done = _read_journal(journal, len(todo))
    table: dict[str, np.ndarray] = {}
    reasons: dict[int, str] = {}

    def take(number: int, scores: Scores) -> None:
        batch = todo[number]
        for name, values in scores.columns.items():
            table.setdefault(name, np.full(len(examples), np.nan))[batch] = values
        reasons.update({int(batch[at]): reason for at, reason in scores.reasons.items()})

    for number, scores in done.items():
        take(number, scores)
    before = np.concatenate([todo[number] for number in done]) if done else np.empty(0, dtype=np.int64)
    pending = ((n, [examples[i] for i in batch]) for n, batch in enumerate(todo) if n not in done)
    tokens = int(lengths[unique].sum())
    with progress(title, tokens, len(unique), int(lengths[before].sum()), len(before)) as advance:
        for number, scores in (engine or local(scorer))(pending):
            take(number, scores)
            _append(journal, number, len(todo), scores)
            advance(int(lengths[todo[number]].sum()), len(todo[number]))
    for values in table.values():
        values[list(reasons)] = np.nan
    columns = {name: values[place] for name, values in table.items()}
    return Scores(columns, {int(n): reasons[int(place[n])] for n in np.flatnonzero(np.isin(place, list(reasons)))})


def _first_of_equals(examples: Sequence[Example]) -> tuple[np.ndarray, np.ndarray]:
    """(index of the first example that equals each one, those indices once each and in order)."""
    digests = np.empty((len(examples), 2), dtype=np.uint64)
    for n, example in enumerate(examples):
        digests[n] = np.frombuffer(example_digest(example), dtype=np.uint64)
    order = np.lexsort(digests.T)  # stable, so that the first of equals comes first
    new = np.ones(len(order), dtype=bool)
    new[1:] = (digests[order[1:]] != digests[order[:-1]]).any(1)
    place = np.empty(len(order), dtype=np.int64)
    place[order] = order[new][np.cumsum(new) - 1]
    return place, np.sort(order[new])


def local(scorer: ScoreFunction) -> Engine:
    """Scores the batches here, one after the other."""
    whole = fitting(scorer)
    return lambda batches: ((number, whole(batch)) for number, batch in batches)


def batches(examples: Sequence[Example], tokens: int) -> list[list[int]]:
    """Indices of examples of like length, longest first, so that rows × longest stays within `tokens` (padding
    included) wherever one row does."""
    return [batch.tolist() for batch in by_length(token_counts(examples), tokens)]


def by_length(lengths: np.ndarray, tokens: int) -> list[np.ndarray]:
    """What `batches` does, from the examples' lengths alone."""
    order = np.argsort(-lengths, kind="stable")
    result, start = [], 0
    while start < len(order):
        stop = start + max(1, tokens // max(1, int(lengths[order[start]])))
        result.append(order[start:stop])
        start = stop
    return result


def fitting(scorer: ScoreFunction) -> Callable[[Sequence[Example]], Scores]:
    """The scorer, for batches of any size: one too large for the memory is halved until it fits, and what did not fit
    once is not tried again."""
    room = inf  # tokens, padding included

    def scored(batch: Sequence[Example]) -> Scores:
        nonlocal room
        size = len(batch) * max(len(e.ids) for e in batch)
        if len(batch) == 1 or size < room:
            try:
                found = scorer(batch)
                return found if isinstance(found, Scores) else Scores(found)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                if len(batch) == 1:
                    row, tokens = batch[0].row + 1, len(batch[0].ids)
                    raise UserError(
                        f"row {row} ({tokens} tokens) does not fit into memory: lower --max-length"
                    ) from error
            room = min(room, size)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        middle = len(batch) // 2
        one, other = scored(batch[:middle]), scored(batch[middle:])
        columns = {name: np.concatenate([one[name], other[name]]) for name in one.columns}
        return Scores(columns, {**one.reasons, **{middle + n: reason for n, reason in other.reasons.items()}})

    return scored


def example_digest(example: Example) -> bytes:
    """The same for examples that no scorer can tell apart."""
    said = repr(example.conversation).encode("utf-8", "backslashreplace") if example.conversation else b""
    return hashlib.blake2b(example.ids.tobytes() + example.mask.tobytes() + said, digest_size=16).digest()


def as_json(scores: Scores) -> dict[str, Any]:
    """The scores for JSON, which keeps every digit."""
    columns = {name: [float(v) for v in values] for name, values in scores.columns.items()}
    reasons = {str(n): reason for n, reason in scores.reasons.items()}
    return {"columns": columns, **({"reasons": reasons} if reasons else {})}


def from_json(entry: Mapping[str, Any]) -> Scores:
    """The scores that `as_json` was given."""
    columns = {name: np.array(values, dtype=np.float64) for name, values in entry["columns"].items()}
    return Scores(columns, {int(n): reason for n, reason in entry.get("reasons", {}).items()})


def _read_journal(journal: Path | None, total: int) -> dict[int, Scores]:
    """Finished batches by number."""
    entries = read_lines(journal) if journal else []
    if any(entry.get("of") != total for entry in entries):
        raise UserError(f"{journal}: belongs to other rows or another --batch-tokens; choose another folder")
    return {entry["batch"]: from_json(entry) for entry in entries}


def _append(journal: Path | None, number: int, total: int, scores: Scores) -> None:
    if journal is None:
        return
    try:
        append_line(journal, {"batch": number, "of": total, **as_json(scores)})
    except OSError as error:
        raise UserError(f"{journal}: can't be written ({error.strerror}); free some space and run it again") from error
