"""Scorers by name. A new file in `baselines/` registers itself; `SCORERS.register` adds a scorer from elsewhere."""

from typing import Any

from gradshield.base.registry import Registry
from gradshield.scoring.base import Scorer

SCORERS: Registry[Scorer] = Registry(
    "scorer",
    "SCORER",
    {"intent": "gradshield.scoring.intent.intent", "fihs": "gradshield.scoring.fihs.fihs"},
    "gradshield.scoring.baselines",
)


def find_scorer(text: str) -> tuple[Scorer, Any]:
    """The scorer and its options for NAME[:key=value,…]. Raises UserError naming what is wrong."""
    return SCORERS.find(text)
