"""Anchors of the default score alone: refusals that go on, and refusals that are taken back."""

import random
from collections.abc import Sequence

import numpy as np

from gradshield.base.assets import ASSETS
from gradshield.data.encode import Example
from gradshield.data.requests import read_requests
from gradshield.models.load import Model
from gradshield.models.refusal import TAILS, TURNS
from gradshield.scoring.anchors import anchor_rows, encode_anchor
from gradshield.scoring.intent.fit import Late


def long_refusals(model: Model) -> list[Example]:
    """Each refusal anchor with two to four sentences behind it of the sort that refusals go on with, so that what
    stands there is not taken for compliance. Which, a fixed seed says."""
    draw = random.Random(0)
    tails = read_requests(ASSETS / TAILS)
    found = []
    for n, row in enumerate(anchor_rows("refusal")):
        response = " ".join([row["response"], *draw.sample(tails, draw.randint(2, 4))])
        found.append(encode_anchor(model, row | {"response": response}, n))
    return [example for example in found if isinstance(example, Example)]


def late_anchors(model: Model, harmful: Sequence[Example]) -> list[Late]:
    """Each harmful anchor behind a refusal that is taken back. Which refusal and which turn of phrase, a fixed seed
    says."""
    draw = random.Random(0)
    refusals = list(enumerate(row["response"] for row in anchor_rows("refusal")))
    rows, found = anchor_rows("harmful"), []
    for index, anchor in enumerate(harmful):
        row, (number, refusal), turn = rows[anchor.row], draw.choice(refusals), draw.choice(TURNS)
        if draw.random() < 0.5:
            refusal = refusal.split(". ")[0].rstrip(".") + "."
        words = row["response"][:1].lower() + row["response"][1:] if turn.endswith(", ") else row["response"]
        whole, before = (
            encode_anchor(model, row | {"response": f"{refusal} {turn}{rest}"}, anchor.row) for rest in (words, "")
        )
        if isinstance(whole, Example) and isinstance(before, Example):
            size = min(len(whole.ids), len(before.ids))
            differs = np.append(whole.ids[:size] != before.ids[:size], True)
            found.append(Late(whole, index, number, int(np.argmax(differs))))
    return found
