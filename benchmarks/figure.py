"""The picture of docs/performance.md: a line of three panels a model (time, memory, growth in rows)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from statistics import median

import matplotlib.pyplot as plt

from benchmarks.measure import ALL
from benchmarks.plan import OURS
from benchmarks.results import Results, curve

MINE, THEIRS, MARKS = "#1f6f5c", "#b9b4a8", {"lora": "#c2603a", "forward": "#5b6470"}


def draw(found: Sequence[Results], stem: Path) -> None:
    """Saves the picture as `stem`.svg and `stem`.png."""
    plt.rcParams.update(
        {"font.size": 8, "svg.hashsalt": "gradshield", "axes.spines.top": False, "axes.spines.right": False}
    )
    figure, axes = plt.subplots(max(1, len(found)), 3, figsize=(11, 3.6 * max(1, len(found))), squeeze=False)
    for line, each in zip(axes, found):
        _bars(line[0], {m: median(v) for m, v in each.ratios.items()}, f"{each.name}: time, × a forward pass", "{:.2f}")
        memory = {m: b / 2**20 for m, b in each.memory.items()}
        _bars(line[1], memory, "memory above the model, MiB", "{:,.0f}")
        _curves(line[2], each)
    figure.tight_layout()
    stem.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})
    figure.savefig(stem.with_suffix(".png"), dpi=130)
    plt.close(figure)


def _bars(ax: Any, values: dict[str, float], title: str, form: str) -> None:
    ordered = sorted(values.items(), key=lambda item: -item[1])
    colors = [MINE if m in (*OURS, "intent") else MARKS.get(m, THEIRS) for m, _ in ordered]
    names = [
        ALL[m].label.replace("*", "").replace("`", "").split(" (")[0] if m not in OURS else f"GradShield {m}"
        for m, _ in ordered
    ]
    bars = ax.barh(names, [v for _, v in ordered], color=colors)
    ax.bar_label(bars, [form.format(v) for _, v in ordered], padding=2)
    ax.margins(x=0.12)
    ax.set_title(title, loc="left", fontsize=9)


def _curves(ax: Any, each: Results) -> None:
    for method in ALL:
        points = curve(each, "rows", method)
        if points:
            color = MINE if method in (*OURS, "intent") else MARKS.get(method, THEIRS)
            ax.plot(*zip(*points), marker="o", ms=3, lw=1.2, color=color)
            ax.annotate(method, points[-1], xytext=(4, 0), textcoords="offset points", color=color, fontsize=7)
    ax.set(xscale="log", yscale="log", xlabel="rows of 16 tokens", ylabel="seconds")
    ax.set_title("growth with rows", loc="left", fontsize=9)
