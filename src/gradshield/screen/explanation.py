"""The result of `explain` for a row. Imports no torch, since the review page shows it, too."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Explanation:
    """A row's score and what it is made of; shares are of the summed absolute parts of the row's FIHS."""

    row: int
    score: float
    threshold: float
    verdict: str
    by_fihs: bool  # FIHS decided; else its parts below are a second opinion
    signals: Mapping[str, float]
    anchors: Mapping[str, float]  # median score of each kind of anchor
    refusal: float | None  # score of the same request with a refusal as its answer; None for plain text
    tokens: tuple[tuple[str, float], ...]  # every token with its share of FIHS
    modules: tuple[tuple[str, float], ...]  # the ten modules with the largest share
    probes: tuple[tuple[str, float], ...]  # cosine of the row's gradient with each probe's, highest first
