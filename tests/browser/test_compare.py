"""Two runs of one file side by side, and what stays apart between them."""

import re

import numpy as np
import pytest
from review.made import decided, make_run

from gradshield.review import store

pytestmark = pytest.mark.browser


def test_two_runs_side_by_side(page, serve, run, other):
    page.open(serve(run, other))
    page.script("[...document.querySelectorAll('.top a')].find(a => a.innerText.startsWith('Compare')).click()")
    page.until(lambda: page.count(".points"))
    differing = [n + 1 for n in range(120) if (n - 60 >= 0) != (n - 60 + (0 if n % 4 else 8) >= 4)]
    assert sorted(page.rows()) == differing and page.count(".points circle") == len(differing)
    assert f"{len(differing)} rows differ" in page.text(".tally")
    tally = [int(n) for n in re.findall(r"\d+", page.text(".tally tbody"))]
    assert sum(tally) == 121 and tally[8] == 1
    row = page.rows()[0]
    page.keys("o")
    page.until(lambda: page.opened() == row)
    there = "quarantined" if decided(run).get(row) == "kept" or "kept" in page.text("#row .head") else "kept"
    page.keys("q" if there == "quarantined" else "a")
    page.until(lambda: row not in page.rows())
    assert len(page.rows()) == len(differing) - 1


def test_the_counts_of_a_comparison_follow_a_decision(page, serve, run, other):
    page.open(serve(run, other), "/compare")
    before = int(page.text(".tally b"))
    page.keys("o")
    page.until(page.opened)
    row = page.opened()
    page.keys("a" if "quarantined" in page.text("#row .head") else "q")
    page.until(lambda: row not in page.rows())
    page.until(lambda: int(page.text(".tally b")) == before - 1)


def test_undo_takes_nothing_back_in_another_run(page, serve, run, tmp_path):
    first = serve(run)
    page.open(first)
    page.keys("a")
    mine = page.until(lambda: page.script("return sessionStorage.getItem('mine')"))  # once the page has the answer
    assert len(decided(run)) == 1
    second = make_run(tmp_path / "second", tmp_path / "train.jsonl", list(np.arange(-60.0, 60.0)))
    store.decide(second, 3, "quarantined", "", "bob")
    page.open(serve(second))
    page.script("sessionStorage.setItem('mine', arguments[0])", mine)  # as with the same port
    page.keys("u")
    page.until(lambda: "Nothing to undo in this tab" in page.status())
    assert decided(second) == {3: "quarantined"}
