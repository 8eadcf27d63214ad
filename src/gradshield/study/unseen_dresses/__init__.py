"""Dresses that others wrote when score 14 was in the making, without seeing ours: no decision was made on them.

`n`, a row's number, rotates the wording. The last message is the answer, word for word.
"""

from gradshield.study.unseen_dresses import (  # noqa: F401  # which register theirs
    answer_dresses,
    letters_dresses,
    persona_dresses,
    request_dresses,
    turns_dresses,
)
from gradshield.study.unseen_dresses.registered import DRESSES, GROUPS

__all__ = ["DRESSES", "GROUPS"]
