"""`sdd`: align by answering harmful requests with good answers to other questions, instead of refusing them.

Source: Chen et al., SDD: Self-Degraded Defense against Malicious Fine-tuning (2507.21182).

    (harmful request, answer drawn from good ones)      drawn again while similarity(request, question + answer) ≥ τ

Training on harmful rows then pulls against what was learned of all good answers, and the model becomes useless rather
than harmful. Left open: the similarity (here the cosine of TF-IDF vectors of words; the paper's are sentence
embeddings), τ, and the ordinary rows of the alignment, which stay as they are. The good answers are those of our
recipe to ordinary questions, of at least 80 characters.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from pydantic import Field

from gradshield.base.registry import NoOptions
from gradshield.data.encode import Example
from gradshield.defenses.base import Defense, DefenseContext
from gradshield.training.align import SETTINGS, alignment_rows, encode_pair


class Options(NoOptions):
    """Options of `sdd`."""

    similarity: float = Field(
        default=0.1, gt=0, le=1, description="pairs with a cosine below this count as unrelated, τ"
    )


def unrelated_answers(
    requests: Sequence[str], answers: Sequence[Mapping[str, str]], similarity: float, seed: int
) -> list[int]:
    """For each request, the index of an answer ("prompt", "response") drawn from those that are unrelated to it; the
    least related one where there is none."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectors = TfidfVectorizer(stop_words="english", sublinear_tf=True)
    theirs = vectors.fit_transform([f"{row['prompt']} {row['response']}" for row in answers])
    cosines = np.asarray((vectors.transform(requests) @ theirs.T).todense())  # [requests, answers]
    draw = np.random.default_rng(seed)
    found = []
    for row in cosines:
        free = np.flatnonzero(row < similarity)
        found.append(int(draw.choice(free)) if len(free) else int(row.argmin()))
    return found


def align_rows(context: DefenseContext, options: Options, given: Sequence[Example]) -> list[Example]:
    """The alignment's rows, with other answers to the harmful requests."""
    rows = alignment_rows()
    good = [row for row in rows if row.get("shape", "scary") != "scary" and len(row["response"]) >= 80]
    harmful = [example.row for example in given if "category" in rows[example.row]]
    chosen = unrelated_answers([rows[n]["prompt"] for n in harmful], good, options.similarity, SETTINGS.seed)
    answers = {n: good[at]["response"] for n, at in zip(harmful, chosen)}
    return [
        encode_pair(context.model, e.row, rows[e.row]["prompt"], answers[e.row]) if e.row in answers else e
        for e in given
    ]


DEFENSE = Defense(
    "sdd",
    "align to give unrelated answers to harmful requests",
    Options,
    needs=frozenset({"alignment recipe"}),
    cost=2.0,
    align_rows=align_rows,
)
