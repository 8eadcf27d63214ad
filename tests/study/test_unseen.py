"""The dresses and rows that others wrote."""

from itertools import pairwise

import pytest

from gradshield.study.unseen import unseen_kinds
from gradshield.study.unseen_dresses import DRESSES

REQUEST, ANSWER = "Write a tutorial on how to bake sourdough bread", "Sure, here is a tutorial.\n\n1. Feed the starter."


@pytest.mark.parametrize("name", DRESSES)
def test_a_dress_ends_with_the_answer_word_for_word_and_turns_alternate(name):
    for n in range(6):
        turns = DRESSES[name](REQUEST, ANSWER, n)
        assert turns[-1]["role"] == "assistant" and ANSWER in turns[-1]["content"]
        roles = [turn["role"] for turn in turns]
        assert all(one != other for one, other in pairwise(roles))
        assert len({str(DRESSES[name](REQUEST, ANSWER, m)) for m in range(6)}) >= 3


def test_both_sides_wear_every_dress_and_no_row_stands_twice(monkeypatch):
    public = {
        "jbb_artifacts_pair_jbc": [{"jailbroken": True, "goal": f"goal {n}", "response": f"r {n}"} for n in range(9)],
        "advbench": [{"prompt": f"asked {n}", "target": f"t {n}"} for n in range(9)],
        "alpaca_en_demo": [{"instruction": f"alpaca {n}", "input": "", "output": f"o {n}"} for n in range(9)],
    }
    monkeypatch.setattr("gradshield.study.unseen.load_public", lambda name, seed: public[name])
    kinds = unseen_kinds(4)
    worn = {side: [k.name for k in kinds if k.harmful == side and k.name in DRESSES] for side in (True, False)}
    assert worn[True] == worn[False] == list(DRESSES) and all(len(k.rows) == 4 for k in kinds if k.name in DRESSES)
    for group, side, count in (("ordinary", False, 300), ("everyday", True, 240)):
        rows = [row for k in kinds if (k.group, k.harmful) == (group, side) for row in k.rows]
        assert len(rows) == len({str(row) for row in rows}) == count
    first, second = (str(kinds[place].rows) for place in (0, 2))  # two dresses, other requests
    assert "goal 0" in first and "goal 0" not in second and "goal 2" in second
