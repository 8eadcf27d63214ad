"""A scorer over all examples: equal ones scored once, batches by token budget, every finished batch on disk.

The batches follow from the examples alone, and a batch is saved whole or not at all. An interrupted run, resumed, ends
with the same bytes.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gradshield.base.errors import UserError
from gradshield.base.progress import progress
from gradshield.base.storage import append_line, read_lines
from gradshield.data.encode import Example
from gradshield.data.examples import token_counts
from gradshield.models.batching import by_length, halve_to_fit
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
    entries = read_lines(journal) if journal else []
    batch_tokens = entries[0].get("tokens", batch_tokens) if entries else batch_tokens  # a resume has the same batches
    todo = [unique[batch] for batch in by_length(lengths[unique], batch_tokens)]
    if any(entry.get("of") != len(todo) for entry in entries):
        raise UserError(f"{journal}: belongs to other rows; choose another folder")
    done = {entry["batch"]: from_json(entry) for entry in entries}
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
        for number, scores in (engine or score_locally(scorer))(pending):
            take(number, scores)
            _append(journal, {"batch": number, "of": len(todo), "tokens": batch_tokens, **as_json(scores)})
            advance(int(lengths[todo[number]].sum()), len(todo[number]))
    for values in table.values():
        values[list(reasons)] = np.nan
    columns = {name: values[place] for name, values in table.items()}
    return Scores(columns, {int(n): reasons[int(place[n])] for n in np.flatnonzero(np.isin(place, list(reasons)))})


def _first_of_equals(examples: Sequence[Example]) -> tuple[np.ndarray, np.ndarray]:
    """(for each example, the index of the first equal one; those indices, unique and in order)."""
    digests = np.empty((len(examples), 2), dtype=np.uint64)
    for n, example in enumerate(examples):
        digests[n] = np.frombuffer(example_digest(example), dtype=np.uint64)
    order = np.lexsort(digests.T)  # stable, so that the first of equals comes first
    digests = digests[order]
    new = np.ones(len(order), dtype=bool)
    new[1:] = (digests[1:] != digests[:-1]).any(1)
    place = np.empty(len(order), dtype=np.int64)
    place[order] = order[new][np.cumsum(new) - 1]
    return place, np.sort(order[new])


def score_locally(scorer: ScoreFunction) -> Engine:
    """Scores the batches here, one after the other."""
    whole = fit_to_memory(scorer)
    return lambda batches: ((number, whole(batch)) for number, batch in batches)


def fit_to_memory(scorer: ScoreFunction) -> Callable[[Sequence[Example]], Scores]:
    """The scorer, for batches of any size (`halve_to_fit`)."""

    def one(batch: Sequence[Example]) -> Scores:
        found = scorer(batch)
        return found if isinstance(found, Scores) else Scores(found)

    parts = halve_to_fit(
        one,
        lambda e: len(e.ids),
        lambda e: f"row {e.row + 1} ({len(e.ids)} tokens) does not fit into memory: lower --max-length",
    )

    def scored(batch: Sequence[Example]) -> Scores:
        first, *rest = parts(batch)
        if not rest:
            return first
        columns = {name: np.concatenate([part[name] for part in (first, *rest)]) for name in first.columns}
        reasons, start = dict(first.reasons), 0
        for before, part in zip((first, *rest), rest):
            start += len(next(iter(before.columns.values())))
            reasons |= {start + n: reason for n, reason in part.reasons.items()}
        return Scores(columns, reasons)

    return scored


def example_digest(example: Example) -> bytes:
    """The same for examples that no scorer can tell apart."""
    said = repr(example.conversation).encode("utf-8", "backslashreplace") if example.conversation else b""
    return hashlib.blake2b(example.ids.tobytes() + example.mask.tobytes() + said, digest_size=16).digest()


def as_json(scores: Scores) -> dict[str, Any]:
    """The scores as JSON values, without loss of precision."""
    columns = {name: [float(v) for v in values] for name, values in scores.columns.items()}
    reasons = {str(n): reason for n, reason in scores.reasons.items()}
    return {"columns": columns, **({"reasons": reasons} if reasons else {})}


def from_json(entry: Mapping[str, Any]) -> Scores:
    """The scores that `as_json` was given."""
    columns = {name: np.array(values, dtype=np.float64) for name, values in entry["columns"].items()}
    return Scores(columns, {int(n): reason for n, reason in entry.get("reasons", {}).items()})


def _append(journal: Path | None, entry: Mapping[str, Any]) -> None:
    if journal is None:
        return
    try:
        append_line(journal, entry)
    except OSError as error:
        raise UserError(f"{journal}: can't be written ({error.strerror}); free some space and run it again") from error
