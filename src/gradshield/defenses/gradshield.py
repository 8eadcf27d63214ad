"""`gradshield`: screen, train, measure, and search for the threshold (alg. 1, in `tune/search.py`)."""

from gradshield.defenses.base import Defense

DEFENSE = Defense(
    "gradshield",
    "screen the rows, train, and search for a threshold that gives a safe and useful model",
    needs=frozenset({"search"}),
    cost=2.0,
)
