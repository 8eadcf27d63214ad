"""A review and an address → its HTML. Every string passes `visible` and is then escaped, as in the report."""

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np

from gradshield.data import to_conversation
from gradshield.report.filter_report import axis_title
from gradshield.report.painting import Piece, cut
from gradshield.report.render import templates
from gradshield.report.words import argument
from gradshield.review import figures, store
from gradshield.review.state import Review
from gradshield.review.texts import openings, row_of, shown_turns
from gradshield.review.verdicts import (
    ASIDE,
    DECIDED,
    KEPT,
    PAGE,
    QUARANTINED,
    SORTS,
    VERDICTS,
    Judged,
    View,
    judge,
    select,
    threshold_in_force,
)
from gradshield.screen.explanation import Explanation
from gradshield.threshold import is_kept

_TEXT = 20_000  # characters of a turn that are shown unless all are asked for
_TURNS = 60  # turns of a row that are shown unless all are asked for
_MOST = 1_000_000  # characters of a row that a page shows, whatever is asked for
_NAMES = 300  # sources and reasons to choose from
_LAYER = re.compile(r"^[\w.]*\b(?:layers|blocks|h)\.(\d+)\.")  # how a module's name begins
_PASSING = ("full", "alike")  # parameters that go when another row or page is asked for


def render_review(review: Review, path: str, given: Mapping[str, str]) -> str:
    """The page at `path`, "/" or "/compare", with these parameters; those that make no sense are passed over."""
    version, decisions = review.decisions()
    in_force = threshold_in_force(review.saved, decisions)
    view = _view(given)
    judged, differs, rows = _selected(review, path, given, decisions)
    compared = None if differs is None else _compared(review, judged, differs)
    decidable = rows[~review.scores.aside[rows]]
    pages = max(1, math.ceil(len(rows) / PAGE))
    page = min(view.page, pages)
    row = row_number(given.get("row"))

    def url(**changes: Any) -> str:
        kept = {name: value for name, value in given.items() if name not in _PASSING}
        return f"{path}?{urlencode({k: v for k, v in {**kept, **changes}.items() if v not in (None, '')})}"

    return (
        templates(Path(__file__).with_name("templates"))
        .get_template("review.html")
        .render(
            path=path,
            url=url,
            given=given,
            version=version,
            who=review.who,
            summary=review.saved.summary,
            run=review.out.resolve().name,
            file=Path(review.saved.input.path).name,
            other=review.other and review.other.out.resolve().name,
            threshold=judged.threshold,
            in_force=in_force,
            own=review.own,
            effect=_effect(review, judged, decisions),
            chart=review.chart,
            compared=compared,
            view=view,
            sorts=SORTS,
            verdicts=VERDICTS,
            decided_choices=DECIDED,
            sources=review.scores.groups,
            reasons=review.scores.reasons,
            names=_NAMES,
            lines=_lines(review, judged, decisions, rows[(page - 1) * PAGE : page * PAGE].tolist()),
            total=len(rows),
            decidable=len(decidable),
            left=int((~judged.decided[decidable]).sum()),
            axis=axis_title(review.out, review.saved.summary.scorer),
            apply=shlex.join(["gradshield", "apply", argument(review.out)]),
            page=page,
            pages=pages,
            per_page=PAGE,
            unfolded=bool(given.get("text")),
            row=_row(review, judged, decisions, row, given) if 1 <= row <= len(review.scores.score) else None,
        )
    )


def rows_to_decide(review: Review, path: str, given: Mapping[str, str]) -> list[int]:
    """The numbers of all rows in the view at this address that a person can decide."""
    rows = _selected(review, path, given, review.decisions()[1])[2]
    return (rows[~review.scores.aside[rows]] + 1).tolist()


def _selected(
    review: Review, path: str, given: Mapping[str, str], decisions: Mapping[int, store.Decision]
) -> tuple[Judged, np.ndarray | None, np.ndarray]:
    """The verdicts at the threshold that is tried or in force; in a comparison, bool [rows] where the runs differ; and
    the indices of the rows in the view, in its order."""
    in_force, wanted = threshold_in_force(review.saved, decisions), _threshold(given.get("t"))
    judged = judge(review.scores, in_force if wanted is None or path != "/" else wanted, decisions)
    view = _view(given)
    found = review.search(view.q) if view.q else None
    differs = None
    if path == "/compare" and review.other:
        differs = judged.verdict != review.other.verdict
        found = differs if found is None else found & differs
    return judged, differs, select(review.scores, judged, view, found)


def _view(given: Mapping[str, str]) -> View:
    sort, decided = given.get("sort"), given.get("decided", "")
    return View(
        given.get("q", ""),
        *(row_number(given.get(name)) for name in ("source", "verdict", "reason")),
        decided=decided if decided in DECIDED else "",
        sort=sort if sort in SORTS else SORTS[0],
        page=row_number(given.get("page")) or 1,
    )


def row_number(text: str | None) -> int:
    """A number from 1 in what was sent; 0 for anything else."""
    return int(text) if text and text.isascii() and text.isdigit() and len(text) < 12 else 0


def _threshold(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return None if math.isnan(value) else value


def _effect(review: Review, judged: Judged, decisions: Mapping[int, store.Decision]) -> dict[str, Any]:
    """Counts by verdict, and how many rows are elsewhere than the run put them."""
    moved = judged.verdict != review.by_run
    return {
        "count": judged.count(),
        "to_kept": int((moved & (judged.verdict == KEPT)).sum()),
        "to_quarantine": int((moved & (judged.verdict == QUARANTINED)).sum()),
        "decided": int(judged.decided.sum()),
        "against": int((judged.verdict != judged.by_score).sum()),
        "moved_by": decisions.get(0),
    }


def _compared(review: Review, judged: Judged, differs: np.ndarray) -> dict[str, Any]:
    from scipy.stats import rankdata  # slow to import

    other = review.other
    assert other
    x, y = review.scores.score, other.scores.score
    both = np.isfinite(x) & np.isfinite(y)
    ranked = len(np.unique(x[both])) > 1 and len(np.unique(y[both])) > 1
    return {
        "chart": figures.scatter(x, y, differs, (judged.threshold, other.threshold)),
        "thresholds": (judged.threshold, other.threshold),
        "table": [[int(((judged.verdict == a) & (other.verdict == b)).sum()) for b in range(3)] for a in range(3)],
        "differing": int(differs.sum()),
        "correlation": float(np.corrcoef(rankdata(x[both]), rankdata(y[both]))[0, 1]) if ranked else None,
    }


def _lines(
    review: Review, judged: Judged, decisions: Mapping[int, store.Decision], shown: Sequence[int]
) -> list[dict[str, Any]]:
    """The lines of the table."""
    scores, other = review.scores, review.other
    lowest = min(review.own, threshold_in_force(review.saved, decisions))  # at it and above, a row stays folded
    said = openings(review.out, [n + 1 for n in shown])
    lines = []
    for n in shown:
        request, answer, length = said.get(n + 1, ("", "", 0))
        lines.append(
            {
                "row": n + 1,
                "place": scores.place[n],
                "source": scores.groups[scores.group[n]] if scores.group[n] >= 0 else "",
                "score": float(scores.score[n]),
                "distance": float(scores.score[n]) - judged.threshold,
                "verdict": VERDICTS[judged.verdict[n]],
                "decision": decisions.get(n + 1),
                "reason": scores.reasons[scores.reason[n]] if scores.reason[n] >= 0 else "",
                "fold": judged.verdict[n] != KEPT or not (judged.decided[n] or is_kept(scores.score[n], lowest)),
                "request": request,
                "answer": answer,
                "length": length,
                "other_score": float(other.scores.score[n]) if other else None,
                "other_verdict": VERDICTS[other.verdict[n]] if other else None,
            }
        )
    return lines


def _row(
    review: Review, judged: Judged, decisions: Mapping[int, store.Decision], row: int, given: Mapping[str, str]
) -> dict[str, Any]:
    """What is shown of the row that is open."""
    line = _lines(review, judged, decisions, [row - 1])[0]
    found = row_of(review.out, row)
    said = []
    if found is not None and found.record is not None:
        layout, settings = review.saved.input.layout, review.saved.settings
        said = shown_turns(to_conversation(found.record, layout, settings["columns"], settings.get("trainer", "trl")))
    if not said and found is not None:
        said = [("as in the file", found.raw.decode("utf-8", "replace"))]
    explanation = review.worker.result(row) if judged.verdict[row - 1] != ASIDE else None
    painted, outside = [(role, [Piece(text)]) for role, text in said], 0.0
    if explanation:
        painted, outside = figures.paint(said, explanation.tokens)
    whole = bool(given.get("full"))
    messages, room = [], _MOST
    for role, pieces in painted[: None if whole else _TURNS]:
        if not room:
            break
        messages.append((role, *cut(pieces, room if whole else min(room, _TEXT))))
        room -= sum(len(piece.text) for piece in messages[-1][1])
    alike = review.likeness.nearest(row) if given.get("alike") else []
    state, doing = review.worker.state(row)
    return {
        **line,
        "messages": messages,
        "turns_left": len(painted) - len(messages),
        "most": _MOST if whole else 0,
        "history": store.history(review.out, row),
        "scored": judged.verdict[row - 1] != ASIDE,
        "by_score": VERDICTS[judged.by_score[row - 1]],
        "signals": _signals(review, row, judged.threshold, explanation),
        "explanation": explanation,
        "modules": _signed(explanation.modules) if explanation else (),
        "probes": _signed(explanation.probes) if explanation else (),
        "outside": outside,
        "state": state,
        "doing": doing,
        "alike": list(zip(_lines(review, judged, decisions, [n - 1 for n, _ in alike]), (c for _, c in alike))),
        "alike_asked": bool(given.get("alike")),
    }


def _signals(
    review: Review, row: int, threshold: float, explanation: Explanation | None
) -> tuple[list[tuple[str, float, float]], float | None]:
    """The row's score and its signals, and, once explained, what they are to be seen beside; all on one axis."""
    named = {"score": float(review.scores.score[row - 1])}
    for name, values in review.scores.signals.items():
        value = values[row - 1]
        if isinstance(value, int | float | np.number):
            named[name] = float(value)
    if explanation:
        if explanation.refusal is not None:
            named["same request, refused"] = explanation.refusal
        named |= {f"{kind} anchors, median": value for kind, value in explanation.anchors.items()}
    return figures.dots(named, threshold)


def _signed(named: Sequence[tuple[str, float]]) -> list[tuple[str, float, float]]:
    """(name, value, percent) on an axis with 0 in its middle."""
    most = max((abs(value) for _, value in named), default=0.0) or 1.0
    return [(_LAYER.sub(r"layer \1, ", name), value, round(50 + 50 * value / most, 2)) for name, value in named]
