"""Rows scored by a scorer that is named as on the command line."""

from collections.abc import Sequence

from gradshield.base.assets import ASSETS
from gradshield.base.settings import FilterSettings
from gradshield.data.encode import Example
from gradshield.data.requests import read_requests
from gradshield.models.load import Model
from gradshield.scoring.anchors import encode_anchor
from gradshield.scoring.base import Scores
from gradshield.scoring.check import AlignmentCheck
from gradshield.scoring.engine import score
from gradshield.scoring.reference import make_reference

PROBES = tuple(read_requests(ASSETS / "probes.jsonl")[:4])
CHECK = AlignmentCheck(PROBES, (True,) * 4, ("No",) * 4, (1.0,) * 4, ())


def rows_of(model: Model, pairs: Sequence[tuple[str, str]]) -> list[Example]:
    """(request, response) pairs as examples, with their text."""
    found = [encode_anchor(model, {"prompt": q, "response": a}, n) for n, (q, a) in enumerate(pairs)]
    assert all(isinstance(e, Example) for e in found), found
    return found  # type: ignore[return-value]


def scored(model: Model, spec: str, rows: Sequence[Example], own_safe: Sequence[Example] = ()) -> Scores:
    """The rows' scores, without a threshold."""
    reference = make_reference(model, CHECK, FilterSettings(scorer=spec, threshold="fixed"), rows, own_safe=own_safe)
    return score(reference.scored_part(rows), reference.scorer, batch_tokens=400)
