"""What the page shows of long rows, many sources and numbers that a field has to give back."""

import re
import time
from html import unescape

import numpy as np
import pytest
from review.client import serving
from review.made import chat, make_run, write_jsonl

from gradshield.review.page import render_review
from gradshield.review.state import Review


def test_of_a_row_of_millions_of_characters_a_page_shows_one_million_and_says_so(tmp_path):
    turns = [{"role": "user", "content": "\u202ea" * 1_000_000}, {"role": "assistant", "content": "b" * 1_500_000}]
    turns += [{"role": "user", "content": "later"}, {"role": "assistant", "content": "c"}]
    file = write_jsonl(tmp_path / "train.jsonl", [{"messages": turns}, chat("short", "row " * 9000)])
    review = Review(make_run(tmp_path / "run", file, [-1.0, -2.0]), None, "ann")
    start = time.process_time()
    html = render_review(review, "/", {"row": "1", "full": "1", "text": "1"})
    assert time.process_time() - start < 10 and html.count("‹U+202E›") == 500_000
    assert "1,000,000 more characters." in html and "3 more turns." in html and "bbb" not in html
    assert html.count("A page shows at most 1,000,000 characters of a row") == 2 and "Show all" not in html
    assert "Show all" in render_review(review, "/", {"row": "1"})
    whole = render_review(review, "/", {"row": "2", "full": "1"})
    assert "row " * 9000 in whole and "A page shows at most" not in whole


@pytest.fixture
def many(tmp_path):
    """401 rows of as many sources, whose threshold is no short number."""
    file = write_jsonl(tmp_path / "train.jsonl", [chat("a", "b", source=f"s{n:03}") for n in range(401)])
    return make_run(tmp_path / "run", file, list(np.linspace(0, 1, 401)), threshold=0.1 + 0.2)


def test_a_threshold_that_is_sent_back_as_it_is_shown_moves_no_row(many):
    with serving(many) as client:
        client.open()
        for given in ({}, {"t": repr(2 / 3)}, {"t": "1e-05"}, {"t": "inf"}):
            html = client.page(**given)
            (field,) = re.findall(r'id="exact"[^>]*value="([^"]*)"', html)
            counts = re.findall(r'data-count="[^"]+">([\d,]+)<', html)
            assert re.findall(r'data-count="[^"]+">([\d,]+)<', client.page(t=field)) == counts
            assert float(field) == float(given.get("t", 0.1 + 0.2))


def test_what_was_searched_for_stays_the_same_in_a_form_that_passes_it_on(many):
    with serving(many) as client:
        client.open()
        words = '\u200b\u202e "quoted" <b>\u00ad'
        fields = re.findall(r'<input type="hidden" name="q" value="([^"]*)"', client.page(q=words, t="1"))
        assert fields and {unescape(field) for field in fields} == {words}


def test_a_source_beyond_those_that_are_listed_stays_chosen_and_the_rest_is_counted(many):
    review = Review(many, None, "ann")
    for chosen in (0, 300, 350):
        html = render_review(review, "/", {"source": str(chosen)} if chosen else {})
        (select,) = re.findall(r'<select name="source">.*?</select>', html, re.DOTALL)
        options = re.findall(r'<option value="(\d+)"( selected)?>([^<]*)</option>', select)
        assert [value for value, selected, _ in options if selected] == [str(chosen)] * (chosen > 0)
        assert all(review.scores.groups[int(value) - 1] == name for value, _, name in options)
        assert len(options) == (301 if chosen == 350 else 300)
        assert f"<option disabled>{401 - len(options)} more</option>" in select
    (verdicts,) = re.findall(r'<select name="verdict">.*?</select>', html, re.DOTALL)
    assert "more" not in verdicts and verdicts.count("<option") == 4
