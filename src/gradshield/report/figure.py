"""Scores → the distribution as inline SVG, coloured by the page's CSS variables.

Drawn twice, for wide and for narrow screens, since text in a scaled SVG shrinks with it. The threshold is an edge
between two bars, so no bar mixes kept and quarantined rows, and far outliers are counted in the outermost bars, so a
single one can't squeeze the rest into a line.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import matplotlib
import numpy as np
from markupsafe import escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from gradshield.report.axis import BARS, Histogram, drawable, histogram_of, rows_in
from gradshield.report.text import number

# Colours that appear nowhere else, put in place of the page's variables while matplotlib draws.
_INKS = {"#010203": "ink", "#010204": "muted", "#010205": "kept", "#010206": "bad", "#010207": "bad-tint"}
INK, MUTED, KEPT, BAD, TINT = _INKS


@dataclass(frozen=True)
class Drawing:
    """The two SVG elements, and notes that the bars can't show."""

    wide: str
    narrow: str
    notes: tuple[str, ...]


class Size(NamedTuple):
    """A drawing for one width of screen."""

    name: str
    width: float  # in points, which become the SVG's own units
    height: float
    bars: int
    ticks: int
    font: float


_SIZES = (Size("wide", 640, 300, BARS, 7, 10.5), Size("narrow", 330, 320, 26, 4, 12))


def draw_scores(
    scores: np.ndarray, verdicts: Sequence[str], threshold: float, anchors: Mapping[str, np.ndarray], axis: str
) -> Drawing | None:
    """The scores [rows] of kept and quarantined rows as bars, anchors [any number] a kind as ticks below.

    `axis` is the title of the score's axis. Returns None where no row has a finite score. `threshold` may be infinite:
    no line is drawn then.
    """
    verdicts_ = np.asarray(verdicts, dtype=object)
    groups = {kind: drawable(scores[verdicts_ == kind]) for kind in ("kept", "quarantined")}
    anchors = {kind: drawable(values) for kind, values in anchors.items() if np.isfinite(values).any()}
    chart = histogram_of(np.concatenate(list(groups.values())), threshold, anchors.values())
    drawn = chart.values
    if not len(drawn):
        return None
    line = float(threshold) if chart.low <= threshold <= chart.high else None
    notes = tuple(_notes(chart, line, bool(anchors)))
    counted = ", ".join(f"{len(values):,} {kind}" for kind, values in groups.items())
    label = f"Histogram of the scores from {number(drawn.min())} to {number(drawn.max())}: {counted}; "
    label += f"threshold {number(threshold)}." if np.isfinite(threshold) else "no threshold."
    return draw(lambda size: _figure(size, groups, chart, line, anchors, axis), label, notes)


def draw(figure: Callable[[Size], Figure], label: str, notes: tuple[str, ...] = ()) -> Drawing:
    """The figure made for every size, as SVG; `label` is what a screen reader says of it."""
    drawings = []
    for size in _SIZES:
        with matplotlib.rc_context():
            matplotlib.rcdefaults()  # a user's own matplotlibrc is ignored
            matplotlib.rcParams.update(
                {"svg.fonttype": "none", "svg.hashsalt": size.name, "font.size": size.font, "hatch.linewidth": 1.1}
            )
            drawings.append(_svg(figure(size), label))
    return Drawing(*drawings, notes=notes)


def spark(values: np.ndarray, edges: np.ndarray, threshold: float) -> str:
    """A word-sized histogram: bars over `edges`, with a dashed line at the threshold."""
    values = values[np.isfinite(values)]
    counts = rows_in(values, edges)
    width, height = 100 / len(counts), 20.0
    bars = "".join(
        f'<rect x="{n * width:.1f}" y="{height - size:.1f}" width="{0.85 * width:.1f}" height="{size:.1f}"/>'
        for n, size in enumerate(np.maximum(counts / max(counts.max(), 1) * height, (counts > 0) * 1.5))
        if size
    )
    line = ""
    if edges[0] <= threshold <= edges[-1]:
        x = (threshold - edges[0]) / (edges[-1] - edges[0]) * 100
        line = f'<path d="M{x:.1f} 0V20" stroke="var(--ink)" stroke-width="1" stroke-dasharray="3 2"/>'
    label = f"Scores from {number(values.min())} to {number(values.max())}"
    return f'<svg viewBox="0 0 100 20" role="img" aria-label="{label}" fill="var(--kept)">{bars}{line}</svg>'


def _figure(
    size: Size,
    groups: Mapping[str, np.ndarray],
    chart: Histogram,
    line: float | None,
    anchors: Mapping[str, np.ndarray],
    axis: str,
) -> Figure:
    figure = Figure((size.width / 72, size.height / 72), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.03, hspace=0.02)  # type: ignore[union-attr]
    heights = [1.0, 0.09 + 0.075 * len(anchors)] if anchors else [1.0]
    axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    edges = chart.edges(size.bars)
    _bars(axes[0], groups, edges, chart.log)
    if anchors:
        _ticks(axes[1], anchors, edges)
    axes[-1].set_xlabel(axis, color=MUTED)
    axes[-1].xaxis.set_major_locator(MaxNLocator(size.ticks, steps=[1, 2, 2.5, 5, 10]))
    margin = 0.01 * (edges[-1] - edges[0])
    for one in axes:
        one.set_xlim(edges[0] - margin, edges[-1] + margin)
        one.tick_params(length=0, pad=5, labelcolor=MUTED)
        one.xaxis.offsetText.set_color(MUTED)
        one.patch.set_visible(False)
        for side, spine in one.spines.items():
            spine.set(visible=side == "bottom" and one is axes[0], color=MUTED, linewidth=0.8)
        if line is not None:
            one.axvline(line, color=INK, linewidth=1.4, linestyle=(0, (4, 2)))
    if line is not None:
        right = (line - edges[0]) > (edges[-1] - edges[0]) / 2
        axes[0].text(
            line,
            1.03,
            f"threshold {number(line)}",
            transform=axes[0].get_xaxis_transform(),
            ha="right" if right else "left",
            color=INK,
            weight="bold",
        )
    figure.patch.set_visible(False)
    return figure


def _bars(axes: Axes, groups: Mapping[str, np.ndarray], edges: np.ndarray, log: bool) -> None:
    looks = {
        "kept": {"facecolor": KEPT, "edgecolor": "none"},
        "quarantined": {"facecolor": TINT, "edgecolor": BAD, "hatch": "/////", "linewidth": 0.9},
    }
    base = np.zeros(len(edges) - 1)
    for kind, values in groups.items():
        count = rows_in(values, edges)
        some = count > 0
        axes.bar(
            ((edges[:-1] + edges[1:]) / 2)[some],
            count[some],
            width=0.86 * (edges[1] - edges[0]),
            bottom=base[some],
            **looks[kind],  # type: ignore[arg-type]
        )
        base += count
    axes.set_ylabel("rows (log scale)" if log else "rows", color=MUTED)
    if log:
        axes.set_yscale("log")
        axes.set_ylim(0.5, base.max() * 2)
        axes.minorticks_off()
    else:
        axes.set_ylim(0, base.max() * 1.08)
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 or not value else ""))


def _ticks(axes: Axes, anchors: Mapping[str, np.ndarray], edges: np.ndarray) -> None:
    """A line of ticks for each kind of anchor; those that would fall on one another are drawn once."""
    width = edges[-1] - edges[0]
    for place, values in enumerate(anchors.values()):
        share = np.unique(((values.clip(edges[0], edges[-1]) - edges[0]) / width * 400).round()) / 400
        at = edges[0] + np.clip(share, 0.002, 0.998) * width
        x = np.stack([at, at, np.full_like(at, np.nan)], 1).ravel()  # [3 × ticks]: down, up, pen off
        y = np.tile([place - 0.33, place + 0.33, np.nan], len(at))
        axes.plot(x, y, color=INK, linewidth=1, alpha=0.75)
    axes.set_ylim(len(anchors) - 0.4, -0.7)
    axes.set_yticks(range(len(anchors)), list(anchors))


def _svg(figure: Figure, label: str) -> str:
    """The figure as an SVG element with its label, without ids, links or styles that could touch the page around it."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    box = re.search(r'<svg[^>]*?viewBox="([^"]*)"[^>]*>', text)
    assert box
    text = f'<svg viewBox="{box[1]}" role="img" aria-label="{escape(label)}" focusable="false">{text[box.end() :]}'
    used = set(re.findall(r"#([\w-]+)", text))
    text = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", text)
    text = re.sub(
        r"font: [^;\"]*?([\d.]+px)[^;\"]*", r"font-size: \1", text.replace("font: bold", "font-weight: 600; font:")
    )
    text = re.sub("|".join(_INKS), lambda found: f"var(--{_INKS[found[0]]})", text)
    return re.sub(r"\n\s*", "\n", text).strip()


def _notes(chart: Histogram, line: float | None, anchors: bool) -> list[str]:
    notes, drawn, threshold = [], chart.values, chart.threshold
    if line is None and np.isfinite(threshold):
        notes.append(f"The threshold, {number(threshold)}, lies outside the scores drawn here.")
    elif line is None and threshold > 0:
        notes.append("There is no threshold line: nothing is removed.")
    if chart.log:
        notes.append("The scale of rows is logarithmic, so that small groups stay visible.")
    for count, side in zip(chart.outside(), ("below", "above")):
        if count:
            rows = "1 row lies" if count == 1 else f"{count:,} rows lie"
            reach = (
                f"down to {number(float(drawn.min()))}" if side == "below" else f"up to {number(float(drawn.max()))}"
            )
            notes.append(
                f"{rows} far {side} the rest, {reach}, and {'is' if count == 1 else 'are'} counted in the last bar."
            )
    if anchors:
        notes.append("Ticks below the bars are anchors: bundled rows of known verdict, scored with the same model.")
    return notes
