"""`filter`: train once on the rows that the filter keeps, by whatever --scorer and --threshold."""

from collections.abc import Sequence

from gradshield.base.registry import NoOptions
from gradshield.data.encode import Example
from gradshield.defenses.base import Defense, DefenseContext
from gradshield.threshold import is_kept


def below_threshold(context: DefenseContext, options: NoOptions, rows: Sequence[Example]) -> list[Example]:
    """The rows that score below the threshold."""
    assert context.screen
    scores, threshold = context.screen
    return [e for e in rows if is_kept(scores[e.row], threshold.value)]


DEFENSE = Defense(
    "filter", "train once on the rows that the filter keeps", needs=frozenset({"screening"}), rows=below_threshold
)
