"""Verdicts, filters and order are what a plain loop over the rows would say; figures lose no row and no token."""

import math
import re

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from review.made import chat, make_run, write_jsonl

from gradshield.base.errors import UserError
from gradshield.report.figure import draw_scores
from gradshield.review.figures import Axis, axis_of, histogram, paint, scatter
from gradshield.review.store import Decision
from gradshield.review.verdicts import DECIDED, SORTS, VERDICTS, RunScores, View, judge, read_run_scores, select

numbers = st.floats(-3, 3).map(lambda x: round(x, 1))


def made(scores: list[float | None]) -> RunScores:
    """Every third row of source b; None is a row set aside."""
    aside = np.array([s is None for s in scores])
    return RunScores(
        score=np.array([np.nan if s is None else s for s in scores]),
        aside=aside,
        place=[f"f:{n}" for n in range(len(scores))],
        group=np.arange(len(scores)) % 3 // 2,
        groups=["a", "b"],
        reason=np.where(aside, 0, -1),
        reasons=["broken"],
        signals={},
    )


def decision(row: int, verdict: str) -> Decision:
    return Decision(row, row, verdict, None, "", "ann", "2026-01-01T00:00:00+00:00")


@given(
    st.lists(st.one_of(st.none(), numbers), min_size=1, max_size=30),
    st.one_of(numbers, st.just(math.inf)),
    st.dictionaries(st.integers(1, 30), st.sampled_from(["kept", "quarantined"])),
    st.sampled_from(SORTS),
    st.integers(0, 3),
    st.integers(0, 2),
    st.sampled_from(["", *DECIDED]),
    st.integers(0, 1),
)
def test_a_view_is_what_a_plain_loop_says(values, threshold, chosen, sort, verdict, source, decided, reason):
    scores = made(values)
    decisions = {row: decision(row, v) for row, v in chosen.items() if row <= len(values)}
    judged = judge(scores, threshold, decisions)
    view = View(source=source, verdict=verdict, reason=reason, decided=decided, sort=sort)
    expected = []
    for n, value in enumerate(values):
        by_score = "set aside" if value is None else "quarantined" if value >= threshold else "kept"
        by_hand = n + 1 in decisions and value is not None
        holds = decisions[n + 1].verdict if by_hand else by_score
        assert VERDICTS[judged.verdict[n]] == holds and judged.decided[n] == by_hand
        matches = (
            (not verdict or VERDICTS[verdict - 1] == holds)
            and (not source or scores.groups[source - 1] == scores.groups[scores.group[n]])
            and (not reason or value is None)
            and {"": True, "decided": by_hand, "undecided": not by_hand, "moved": holds != by_score}[decided]
        )
        if matches:
            expected.append(n)

    def key(n: int) -> float:
        value = values[n]
        if sort == "row":
            return 0
        if value is None:
            return math.inf
        near = abs(value - threshold) if math.isfinite(threshold) else -value
        return {"low": value, "high": -value, "near": near}[sort]

    assert select(scores, judged, view, None).tolist() == sorted(expected, key=key)
    assert sum(judged.count().values()) == len(values)
    none = np.zeros(len(values), dtype=bool)
    assert not len(select(scores, judged, view, none))


def test_sources_come_by_how_many_rows_they_have_and_a_missing_reason_is_none(tmp_path):
    file = write_jsonl(
        tmp_path / "f.jsonl", [chat("a", "b", source="a few"), *(chat("a", "b", source="many") for _ in "12"), "{"]
    )
    scores = read_run_scores(make_run(tmp_path / "run", file, [1, 2, 3]), 4)
    assert scores.groups == ["many", "a few", "f.jsonl"] and scores.reason.tolist() == [-1, -1, -1, 0]
    assert set(scores.signals) == {"topic", "answer"}
    with pytest.raises(UserError, match="not the scores"):
        read_run_scores(tmp_path / "run", 5)


@given(st.lists(st.one_of(st.just(math.nan), st.floats(-1e300, 1e300)), max_size=50), st.floats(-5, 5))
@example([0.0, 5e-324], 0.0)
def test_bars_keep_apart_what_lies_below_and_above_the_threshold(values, threshold):
    chart = histogram(np.array(values, dtype=float), threshold)
    axis = chart["axis"]
    assert axis.low < axis.high
    at = axis.at(threshold)
    for x, width, height in chart["bars"]:
        assert -0.01 <= x <= 100.01 and width >= 0 and 0 < height <= 100
        if axis.low < threshold < axis.high:
            assert x + width <= at + 0.01 or x >= at - 0.01
    for x, label in axis.ticks():
        assert 0 <= x <= 100 and label


def test_the_report_draws_the_same_bars_on_the_same_scale():
    rng = np.random.default_rng(0)
    for scores, log in ((rng.normal(size=500), False), (np.concatenate([rng.normal(size=5000), [3.5]]), True)):
        threshold, anchors = 3.0, {"harmful": np.array([4.0, 5.0])}
        chart = histogram(scores, threshold, anchors.values())
        verdicts = np.where(scores >= threshold, "quarantined", "kept").tolist()
        drawing = draw_scores(scores, verdicts, threshold, anchors, "score")
        assert drawing and any("logarithmic" in note for note in drawing.notes) == chart["log"] == log
        lefts = [
            float(x) for x in re.findall(r'<path d="M (\S+) [^"]*?z\s*" clip-path="[^"]*" style="fill: ', drawing.wide)
        ]
        assert len(lefts) == len(chart["bars"])
        places = np.polyfit(lefts, [x for x, *_ in chart["bars"]], 1, full=True)
        assert places[1][0] < 0.01  # the same places on the axis, up to its scale


def test_an_axis_is_not_stretched_by_an_outlier_and_reaches_a_near_mark():
    values = np.concatenate([np.linspace(0, 1, 1000), [1e9]])
    assert axis_of(values).high < 5
    assert axis_of(np.linspace(0, 1, 10), 1.2).high > 1.2
    assert axis_of(np.linspace(0, 1, 10), 99.0).high < 2
    assert axis_of(np.zeros(3)) == axis_of(np.empty(0)) == Axis(-1.04, 1.04)


def test_the_scatter_shows_every_row_once():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 500))
    x[0] = np.nan
    differs = np.arange(500) % 10 == 1
    chart = scatter(x, y, differs, (0.0, math.inf))
    assert len(chart["dots"]) == chart["differing"] == differs.sum()
    assert 0 < len(chart["squares"]) <= 449
    assert len(scatter(x, y, np.ones(500, bool), (0.0, 0.0))["squares"]) == 0


@pytest.mark.parametrize("cut", [0, 9])
def test_painted_turns_read_as_they_stand_and_no_share_is_lost(cut):
    said = [("user", "How are you?"), ("other", "not there"), ("assistant", "Fine, 你好 and thanks")]
    texts = ["<u>", "How ", "are you", "?", "<a>", "Fine", ", 你", "好 and", " thanks", "<end>"]
    texts = texts[: len(texts) - 2] if cut else texts
    shares = [0.1, -0.2, 0.05, 0.05, 0.1, 0.3, 0.0, -0.1, 0.05, 0.05][: len(texts)]
    shares = [s / sum(map(abs, shares)) for s in shares]
    painted, outside = paint(said, list(zip(texts, shares)))
    assert [(role, "".join(piece.text for piece in pieces)) for role, pieces in painted] == said
    marked = {piece.text: piece.level for _, pieces in painted for piece in pieces if piece.level}
    assert marked["Fine"] == "p4" and marked["How "].startswith("n") and "not there" not in marked
    assert outside == 0  # as "not there" may be anywhere
    between = sum(abs(share) for text, share in zip(texts, shares) if text.startswith("<"))
    assert paint([said[0], said[2]], list(zip(texts, shares)))[1] == pytest.approx(between)


def test_a_turn_whose_edges_the_template_trims_is_marked_and_one_not_found_claims_nothing():
    texts = [("<u>", 0.25), ("Hi", 0.25), ("<a>", 0.25), ("Sure", 0.25)]
    painted, outside = paint([("user", "\nHi "), ("assistant", "Sure\n")], texts)
    assert ["".join(piece.text for piece in pieces) for _, pieces in painted] == ["\nHi ", "Sure\n"]
    assert [piece.text for _, pieces in painted for piece in pieces if piece.level] == ["Hi", "Sure"]
    assert outside == pytest.approx(0.5)
    assert paint([("user", "Hi"), ("assistant", "nowhere")], texts)[1] == 0
