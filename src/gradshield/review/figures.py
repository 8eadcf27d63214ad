"""Numbers → what the page draws: bars, dots and marks as percentages of an axis, so that nothing shrinks with the page.

The page draws the threshold, as it moves; the bars below and above it are the same bars, clipped.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from gradshield.report.axis import axis_range, drawable, histogram_of, rows_in
from gradshield.report.painting import Piece, marked

_CELLS = 64  # squares of the scatter, a side
_DOTS = 1500  # rows drawn one by one in the scatter
_STEPS = (0.08, 0.25, 0.5, 0.75)  # of the heaviest token's share, from which a token is marked more strongly


class Axis(NamedTuple):
    """A scale from `low` to `high`; what lies outside is drawn at its ends."""

    low: float
    high: float

    def at(self, value: float) -> float:
        """The place of a value, in percent."""
        value = min(max(value, self.low), self.high)
        return round(100 * (value - self.low) / (self.high - self.low), 3)

    def ticks(self) -> list[tuple[float, str]]:
        """Round numbers along the axis: (percent, label)."""
        step = 10 ** math.floor(math.log10((self.high - self.low) / 4))
        step *= next(m for m in (1, 2, 2.5, 5, 10) if (self.high - self.low) / (step * m) <= 6)
        first = math.ceil(self.low / step)
        values = [n * step for n in range(first, first + 10) if n * step <= self.high]
        return [(self.at(v), f"{v:g}".replace("-", "−") if abs(v) > step / 1e6 else "0") for v in values]


def axis_of(values: np.ndarray, *marks: float) -> Axis:
    """The axis of these finite values, and of marks that lie near; a few far outliers do not stretch it."""
    values = drawable(values)
    low, high = axis_range(values if len(values) else np.zeros(1), marks=marks)
    margin = 0.02 * (high - low)
    return Axis(low - margin, high + margin)


def histogram(scores: np.ndarray, threshold: float, beside: Iterable[np.ndarray] = ()) -> dict[str, Any]:
    """Bars (x, width, height, in percent) of the scores [rows], and the axis below them, as in the report."""
    chart = histogram_of(scores, threshold, beside)
    edges = chart.edges()
    axis = Axis(float(edges[0]), float(edges[-1]))
    width = edges[1] - edges[0]
    counts = rows_in(chart.values, edges)
    top = max(counts.max(), 1)
    heights = np.log1p(counts) / np.log1p(top) if chart.log else counts / top
    gap = 0.14 * width
    return {
        "axis": axis,
        "log": chart.log,
        "top": int(top),
        "outside": sum(chart.outside()),
        "bars": [
            (axis.at(left), round(axis.at(left + width - gap) - axis.at(left), 3), round(100 * float(height), 2))
            for left, height in zip(edges[:-1], heights)
            if height
        ],
    }


def scatter(x: np.ndarray, y: np.ndarray, differs: np.ndarray, at: tuple[float, float]) -> dict[str, Any]:
    """Two runs' scores [rows]: squares by how many rows fall in them, and a dot for rows whose verdict differs.

    `at` holds both thresholds. Of very many differing rows, evenly many are drawn.
    """
    both = np.isfinite(x) & np.isfinite(y)
    across, up = axis_of(x[both], at[0]), axis_of(y[both], at[1])
    agree = both & ~differs
    counts, _, _ = np.histogram2d(
        x[agree].clip(*across), y[agree].clip(*up), _CELLS, [[across.low, across.high], [up.low, up.high]]
    )
    level = np.ceil(4 * np.log1p(counts) / np.log1p(max(counts.max(), 1))).astype(int)
    size = 100 / _CELLS
    dots = np.flatnonzero(both & differs).tolist()
    return {
        "across": across,
        "up": up,
        "squares": [
            (round(i * size, 3), round(100 - (j + 1) * size, 3), int(level[i, j]))
            for i, j in zip(*(axis.tolist() for axis in np.nonzero(counts)))
        ],
        "size": round(size, 3),
        "dots": [
            (across.at(float(x[n])), 100 - up.at(float(y[n]))) for n in dots[:: max(1, math.ceil(len(dots) / _DOTS))]
        ],
        "differing": len(dots),
    }


def dots(named: Mapping[str, float], threshold: float) -> tuple[list[tuple[str, float, float]], float | None]:
    """(name, value, percent) of numbers on one axis, and the threshold's percent where there is one."""
    finite = {name: value for name, value in named.items() if math.isfinite(value)}
    axis = axis_of(np.array([*finite.values(), *([threshold] if math.isfinite(threshold) else [])]))
    placed = [(name, value, axis.at(value)) for name, value in finite.items()]
    return placed, axis.at(threshold) if math.isfinite(threshold) else None


def paint(
    said: Sequence[tuple[str, str]], tokens: Sequence[tuple[str, float]]
) -> tuple[list[tuple[str, list[Piece]]], float]:
    """Each turn in pieces marked by their tokens' share of FIHS, and the share that lies outside all turns.

    A turn whose text the model reads otherwise stays unmarked, and then nothing is said of what lies outside; what is
    cut off, as too long, stays unmarked, too. Templates may leave out blanks at a turn's edges.
    """
    whole = "".join(text for text, _ in tokens)
    heaviest = max((abs(share) for _, share in tokens), default=0.0) or 1.0
    ends = list(zip(accumulate(len(text) for text, _ in tokens), (share for _, share in tokens)))
    painted, at, inside, lost = [], 0, 0.0, False
    for role, given in said:
        text = given.strip()
        left = given[: len(given) - len(given.lstrip())] if text else given
        start = whole.find(text, at) if text else -1
        if start < 0 and text:  # cut off at the model's length: what is left begins it
            start = whole.find(text[0], at)
            while start >= 0 and not text.startswith(whole[start:]):
                start = whole.find(text[0], start + 1)
        if start < 0:
            painted.append((role, [Piece(given)] if given else []))
            lost = lost or bool(text)
            continue
        stop = min(start + len(text), len(whole))
        pieces, before = [Piece(left)], start
        for end, share in ends:
            if end <= start or before >= stop:
                continue
            inside += abs(share)
            pieces.append(marked(whole[before : min(end, stop)], share, [step * heaviest for step in _STEPS]))
            before = end
        pieces.append(Piece(text[stop - start :] + given[len(left) + len(text) :]))
        painted.append((role, [piece for piece in pieces if piece.text]))
        at = stop
    return painted, 0.0 if lost else max(0.0, sum(abs(share) for _, share in tokens) - inside)
