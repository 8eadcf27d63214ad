"""The axis of scores and its bins: far outliers do not stretch it, and one edge is the threshold."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

BARS = 56  # of a wide chart
_HUGE = 1e100  # scores are drawn within ±this, so that no difference of two overflows
_TINY = 1e-100  # a narrower axis can't be divided into bins


def drawable(values: np.ndarray) -> np.ndarray:
    """The finite values, clipped so that differences don't overflow."""
    return np.clip(values[np.isfinite(values)], -_HUGE, _HUGE)


def axis_range(
    values: np.ndarray, beside: Iterable[np.ndarray] = (), marks: Iterable[float] = ()
) -> tuple[float, float]:
    """The lowest and the highest number on the axis of these values [any number, at least 1].

    Values, and those `beside` them, stretch it by one and a half times the values' 1 to 99 % range at most. Marks that
    are near lie on it.
    """
    first, last = np.percentile(values, [1, 99])
    reach = 1.5 * (last - first)
    drawn = np.concatenate([values, *beside])
    low, high = max(drawn.min(), first - reach), min(drawn.max(), last + reach)
    near = [mark for mark in marks if np.isfinite(mark) and low - reach <= mark <= high + reach]
    low, high = min(low, *near, low), max(high, *near, high)
    if high - low <= max(1e-9 * max(abs(low), abs(high)), _TINY):  # all equal, as far as an axis can tell
        margin = max(abs(low) * 0.1, 1.0)
        low, high = low - margin, high + margin
    return float(low), float(high)


def bin_edges(low: float, high: float, threshold: float, count: int) -> np.ndarray:
    """Edges of about `count` equal bins over low … high. One is exactly the threshold, since a row at it is
    quarantined, where it lies between them."""
    if not low <= threshold <= high:
        return np.linspace(low, high, count + 1)
    width = (high - low) / count
    below, above = np.ceil((threshold - low) / width), np.floor((high - threshold) / width) + 1
    return threshold + width * np.arange(-below, above + 1)


def rows_in(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """The number of rows in each bin. Rows outside are counted in the outermost bins."""
    return np.histogram(values.clip(edges[0], edges[-1]), edges)[0]


@dataclass(frozen=True)
class Histogram:
    """Scores and their axis from `low` to `high`, as the report and the review page draw them."""

    values: np.ndarray  # [rows], finite
    threshold: float
    low: float
    high: float

    def edges(self, bars: int = BARS) -> np.ndarray:
        return bin_edges(self.low, self.high, self.threshold, bars)

    @property
    def log(self) -> bool:
        """Whether the tallest bar on one side of the threshold is too small to be seen beside the other side's."""
        edges = self.edges()
        counts, above = rows_in(self.values, edges), edges[:-1] >= self.threshold
        tops = [int(part.max()) for part in (counts[~above], counts[above]) if part.any()]
        return bool(tops) and max(tops) > 40 * min(tops)

    def outside(self) -> tuple[int, int]:
        """The numbers of rows below and above the axis, which are counted in the last bars."""
        return int((self.values < self.low).sum()), int((self.values > self.high).sum())


def histogram_of(scores: np.ndarray, threshold: float, beside: Iterable[np.ndarray] = ()) -> Histogram:
    """The histogram of the scores [rows] that are finite. Scores `beside` them, the anchors', lie on the axis, too."""
    values = drawable(scores)
    low, high = axis_range(values if len(values) else np.zeros(1), [drawable(v) for v in beside], [threshold])
    return Histogram(values, threshold, low, high)
