"""`guard`: a guard model's grade of each request with its answer.

Source: Inan et al., Llama Guard (2312.06674), and any later guard. Two kinds are read from a folder or the Hub:

    sequence classifier:  score(z) = p(harm), the softmax over labels, or the highest sigmoid where labels are several
    chat guard:           score(z) = 0 for "safe", 0.5 for "controversial", 1 for "unsafe"

A row of several turns scores as its worst answer, each judged with the user turn before it. A row that the guard says
nothing readable about is set aside. The guard is the whole method: its policy and its blind spots are its own.
"""

from collections.abc import Sequence

import numpy as np
from pydantic import Field

from gradshield.base.errors import UserError
from gradshield.base.registry import NoOptions
from gradshield.data.encode import Example
from gradshield.models.graders import local_grader
from gradshield.scoring.base import Context, Prepared, Scorer, Scores
from gradshield.scoring.row_text import exchanges


class GuardOptions(NoOptions):
    """Which guard."""

    model: str = Field(default="", description="folder or Hub id of a sequence classifier or a chat guard (needed)")


def prepare(context: Context, options: GuardOptions) -> Prepared:
    """Finds the guard, which is loaded at the first row. Raises UserError if none is named or it is not a guard."""
    if not options.model:
        raise UserError("--scorer guard: no guard model given; use --scorer guard:model=FOLDER_OR_HUB_ID")
    grade = local_grader(options.model, f"--scorer guard:model={options.model}")

    def score(batch: Sequence[Example]) -> Scores:
        pairs = [(n, pair) for n, example in enumerate(batch) for pair in exchanges(example)]
        grades = grade([request for _, (request, _) in pairs], [answer for _, (_, answer) in pairs])
        worst, silent = np.full(len(batch), -np.inf), set()
        for (n, _), found in zip(pairs, grades):
            if found is None or not np.isfinite(found):
                silent.add(n)
            else:
                worst[n] = max(worst[n], (found - 1) / 4)
        worst[list(silent)] = np.nan
        return Scores({"score": worst}, dict.fromkeys(silent, "the guard says neither safe nor unsafe"))

    return Prepared(score)


SCORER = Scorer(
    "guard",
    "verdict of a guard model (--scorer guard:model=FOLDER_OR_HUB_ID)",
    prepare,
    options=GuardOptions,
    needs=frozenset({"text", "request"}),
    cost=1.0,
    version=2,
)
