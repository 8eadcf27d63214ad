"""The page of a `tune` run: its trials' path, what was asked for, and nothing that a browser would obey."""

import pytest
from report.trials_page import TRIALS, page


def test_every_trial_and_the_goal_are_on_the_page(tmp_path):
    html = page(tmp_path)
    assert "Safe and useful after 4 trials, trained on 281 of 330 rows." in html
    for said in ("1: not safe", "2: not useful enough", "3: accepted", "4: failed: fine-tuning diverged"):
        assert said in html
    assert "0.980" in html and "an attack success rate of 0.050 or less" in html
    assert '<td role="cell">none</td>' in html
    assert "[0.003, 0.071]" in html and "1.250 [1.000, 1.500] of 100 answers" in html
    assert html.count('<tr role="row">') == 1 + len(TRIALS)


def test_the_rows_add_up_where_some_of_the_kept_ones_were_held_out(tmp_path):
    html = page(tmp_path, kept=301, quarantined=28, set_aside=1)
    assert "trained on 281 of 330 rows" in html
    assert "301 kept (281 trained on, 20 held out to measure utility), 28 quarantined, 1 set aside" in html


def test_a_rejection_says_why_and_warns_of_its_model(tmp_path):
    html = page(tmp_path, TRIALS[:1], accepted=None, utility=None)
    assert "Rejected after 1 trial: nothing was safe." in html and "do not use it as it is" in html


@pytest.mark.parametrize("name", ["file", "reason", "task", "model"])
def test_hostile_text_stays_text(tmp_path, name):
    html = page(tmp_path, accepted=None, **{name: '<script>alert(1)</script>"\u202e'})
    assert "<script" not in html and "\u202e" not in html and "default-src 'none'" in html


def test_the_screening_is_linked_where_there_was_one(tmp_path):
    assert "no row was scored" in page(tmp_path)
    (tmp_path / "screen").mkdir()
    (tmp_path / "screen" / "report.html").write_text("")
    assert 'href="screen/report.html"' in page(tmp_path)
