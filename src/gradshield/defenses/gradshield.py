"""`gradshield`: screen, train, measure, and search for the threshold (alg. 1, in `tune/search.py`)."""

from gradshield.defenses.base import Defense

DEFENSE = Defense(
    "gradshield",
    "screen the rows, train, and search for the threshold whose model is safe and useful",
    needs=frozenset({"search"}),
    cost=2.0,
)
