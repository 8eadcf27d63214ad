"""Plain lines where nobody sees a bar: seldom, with a rate and the time left, and nothing about what is quick."""

from types import SimpleNamespace

import pytest

from gradshield.base import progress as module
from gradshield.base.progress import followed_by, progress


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    return now


def test_lines_come_every_ten_seconds_and_at_the_end(clock, capsys):
    with progress("scoring", 1000, 100) as advance:
        for _ in range(100):
            clock.seconds += 0.25
            advance(10, 1)
    assert capsys.readouterr().err.splitlines() == [
        "scoring: 40/100 rows, 4.0 rows/s, 15 s left",
        "scoring: 80/100 rows, 4.0 rows/s, 5 s left",
        "scoring: 100/100 rows, 4.0 rows/s, 0 s left",
    ]


def test_what_an_earlier_run_did_is_no_part_of_the_rate_and_time_follows_tokens(clock, capsys):
    with progress("scoring", 1000, 100, 500, 80) as advance:
        clock.seconds += 20
        advance(100, 10)
    assert capsys.readouterr().err == "scoring: 90/100 rows, 0.5 rows/s, 80 s left\n"


def test_an_unknown_end_has_no_time_left(clock, capsys):
    with progress("reading", 0, 0) as advance:
        clock.seconds += 20
        advance(0, 1000)
    assert capsys.readouterr().err == "reading: 1,000 rows, 50.0 rows/s\n"


def test_what_is_quick_is_not_worth_a_line(clock, capsys):
    with progress("scoring", 10, 1) as advance:
        clock.seconds += 1.9
        advance(10, 1)
    assert capsys.readouterr().err == ""


def test_a_terminal_has_a_bar_that_ends_full(clock, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with progress("scoring", 0, 3) as advance:
        for _ in range(3):
            clock.seconds += 0.01
            advance(0, 1)
    assert "3/3 rows" in capsys.readouterr().err


def test_the_time_left_includes_the_work_that_follows(clock, capsys):
    with followed_by(400), progress("fitting", 100, 2) as advance:
        clock.seconds += 20
        advance(50, 1)
    assert capsys.readouterr().err == "fitting: 1/2 rows, 0.1 rows/s, 180 s left, later steps included\n"


def test_the_time_left_is_that_of_the_step_where_the_rest_is_unknown(clock, capsys):
    with followed_by(None), progress("does it refuse?", 0, 48) as advance:
        clock.seconds += 20
        advance(0, 24)
    assert capsys.readouterr().err == "does it refuse?: 24/48 rows, 1.2 rows/s, 20 s left in this step\n"
