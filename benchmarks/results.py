"""The measurements of one model, read back: ratios, peaks, scores, curves and their exponents."""

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.plan import TIMED, read_cells


@dataclass(frozen=True)
class Results:
    """What was measured on one model; a method that was not measured, or did not fit, has no entry."""

    name: str
    cells: list[dict[str, Any]]
    ratios: dict[str, list[float]]  # seconds in units of a forward pass, one a repeat
    memory: dict[str, float]  # bytes above the model, at as many tokens at once as LoRA has
    timed_memory: dict[str, float]  # the same, with the batches that were timed
    scores: dict[str, np.ndarray]
    failed: dict[str, str]

    def ratio(self, method: str) -> float | None:
        """Median of the method's ratios."""
        return median(self.ratios[method]) if method in self.ratios else None


def results(file: Path) -> Results:
    """The measurements of a file, by method."""
    cells = read_cells(file)
    pairs = [cell for cell in cells if cell["kind"] == "pair" and "error" not in cell]
    ratios: dict[str, list[float]] = {}
    for cell in pairs:
        ratios.setdefault(cell["method"], []).append(cell["seconds"] / cell["forward"])

    def peaks(kind: str) -> dict[str, float]:
        return {c["method"]: c["bytes"] for c in cells if c["kind"] == kind and "bytes" in c}

    return Results(
        file.stem,
        cells,
        ratios,
        peaks("memory"),
        peaks(TIMED),
        {c["method"]: np.array(c["scores"]) for c in pairs if "scores" in c},
        {c["method"]: c["error"] for c in cells if "error" in c},
    )


def exponent(r: Results, axis: str, method: str) -> float | None:
    """Slope of log time over log x: seconds for rows and probes, seconds a row for length, seconds for size."""
    points = curve(r, axis, method)
    if len(points) < 2:
        return None
    x, y = np.log(np.array(points)).T
    return float(np.polyfit(x, y, 1)[0])


def curve(r: Results, axis: str, method: str) -> list[tuple[float, float]]:
    """(x, seconds) of a method along an axis, ascending; a row's seconds where x is its length, weights as the size."""
    points = []
    for cell in r.cells:
        if cell["kind"] == "growth" and (cell["axis"], cell["method"]) == (axis, method) and "error" not in cell:
            x = cell["weights"] if axis == "size" else cell["x"]
            points.append((float(x), cell["seconds"] / (cell["rows"] if axis == "length" else 1)))
    return sorted(points)
