"""`safeinstr`: train on refused requests as well.

Source: Bianchi et al., Safety-Tuned LLaMAs (2309.07875); 100 pairs as in GradShield's table 1. The rows trained on are

    D_f ∪ D_s,   D_s: pairs of a harmful request and a refusal

with the training's own loss. The paper mixes 100 to 2,000 pairs into 20,000 instructions and leaves open which: here
they are the bundled refusals at even distances, or the user's own.
"""

from collections.abc import Sequence

from gradshield.data.encode import Example
from gradshield.defenses.base import Defense, DefenseContext
from gradshield.defenses.registry import SafeRows


def with_safe_rows(context: DefenseContext, options: SafeRows, rows: Sequence[Example]) -> list[Example]:
    """The rows and the safe ones."""
    return [*rows, *context.safe_rows(options)]


DEFENSE = Defense(
    "safeinstr",
    "train on refused requests as well (2309.07875)",
    SafeRows,
    needs=frozenset({"safe rows"}),
    rows=with_safe_rows,
)
