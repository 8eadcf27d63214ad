"""docs/performance.md and its picture from the measurements: ratios, peaks, agreement and fitted exponents."""

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from benchmarks.figure import draw
from benchmarks.measure import ALL
from benchmarks.peers import LOW_RANK, PEERS
from benchmarks.plan import OURS, SHORT
from benchmarks.results import Results, curve, exponent, results

AXES = ("rows", "length", "probes", "size")


def write_report(folder: Path, page: Path) -> None:
    """Writes `page`, and its picture beside it as .svg and .png, from every *.jsonl of `folder`."""
    found = [results(file) for file in sorted(folder.glob("*.jsonl"))]
    draw(found, page.with_suffix(""))
    parts = [HEAD.format(picture=page.with_suffix(".svg").name), *(section(each) for each in found), TAIL]
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n".join(parts), encoding="utf-8")


def targets(r: Results) -> list[tuple[str, float | None, str, float]]:
    """(what, measured, "≤" or "≥", bound) of every target; None where something it needs was not measured."""

    def over(a: float | None, b: float | None) -> float | None:
        return a / b if a is not None and b else None

    def dearest(values: Sequence[float | None]) -> float | None:
        return max((v for v in values if v is not None), default=None)

    lora, raw = r.ratio("lora"), r.ratio("paper")
    peers = [median(r.ratios[name]) for name in PEERS if name in r.ratios]
    probes = [curve(r, "probes", name) for name in OURS]
    return [
        ("raw FIHS, × a forward pass", raw, "≤", 2.05),
        ("normalised FIHS, × a forward pass", r.ratio("module"), "≤", 2.4),
        ("normalised FIHS, × a LoRA epoch", over(r.ratio("module"), lora), "≤", 0.75),
        ("the default score (intent), × a LoRA epoch", over(r.ratio("intent"), lora), "≤", 0.75),
        ("best peer, × raw FIHS", over(min(peers, default=None), raw), "≥", 1.5),
        ("bergson, × raw FIHS", over(r.ratio("bergson"), raw), "≥", 3.0),
        (
            "memory above the model, × LoRA's (the dearer of raw and normalised)",
            dearest([over(r.memory.get(name), r.memory.get("lora")) for name in OURS]),
            "≤",
            0.5,
        ),
        (
            "the same, with the batches that were timed",
            dearest([over(r.timed_memory.get(name), r.memory.get("lora")) for name in OURS]),
            "≤",
            0.5,
        ),
        ("exponent in rows (the larger)", dearest([exponent(r, "rows", name) for name in OURS]), "≤", 1.05),
        (
            f"{int(max((p[-1][0] for p in probes if p), default=64))} probes, × one (the dearer)",
            dearest([p[-1][1] / p[0][1] for p in probes if len(p) > 1]),
            "≤",
            1.15,
        ),
    ]


def section(r: Results) -> str:
    """The part of the page about one model."""
    machine = next((c for c in r.cells if c["kind"] == "machine"), {})
    pairs = [c for c in r.cells if c["kind"] == "pair" and "error" not in c]
    busiest = max((c["load"] for c in pairs), default=0.0)
    where = machine.get("gpu") or f"{machine.get('threads')} CPU thread(s)"
    versions = ", ".join(f"{name} {version}" for name, version in machine.get("versions", {}).items())
    lines = [f"## {r.name}", "", f"{where}; {versions}.", ""]
    if not machine.get("gpu") and busiest > machine.get("threads", 0) + 0.7:
        if busiest <= machine.get("cores", 0) + 0.5:
            lines += [f"Another computation had a core of its own beside it (load average up to {busiest:.1f}).", ""]
        else:
            lines += [f"**Measured on a busy machine (load average up to {busiest:.1f}): not to be relied on.**", ""]
    for note in (c["text"] for c in r.cells if c["kind"] == "note"):  # written into the file by hand
        lines += [note, ""]
    lines += ["| target | measured | wanted | met |", "|---|---|---|---|"]
    for what, value, sign, bound in targets(r):
        met = "–" if value is None else "yes" if (value <= bound if sign == "≤" else value >= bound) else "**no**"
        lines.append(f"| {what} | {_number(value)} | {sign} {bound:g} | {met} |")
    lines += ["", _methods_table(r), "", _growth_table(r)]
    return "\n".join(lines) + "\n"


def _methods_table(r: Results) -> str:
    pair: dict[str, Any] = {"rows": 0, "longest": 0, "tokens": 0}
    pair |= next((c for c in r.cells if c["kind"] == "pair" and "error" not in c), {})
    lines = [
        f"{pair['rows']} rows of up to {pair['longest']:,} tokens, {pair['tokens']:,} in all.",
        "",
        "| method | × forward (range) | × LoRA epoch | tokens/s | memory above the model, MiB (× LoRA's) "
        "| Pearson | Spearman | largest error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lora, lora_memory = r.ratio("lora"), r.memory.get("lora")
    for name, method in ALL.items():
        if name not in r.ratios and name not in r.memory and name not in r.failed:
            continue
        values, peak = r.ratios.get(name, []), r.memory.get(name)
        ratio = f"{median(values):.2f} ({min(values):.2f}–{max(values):.2f})" if values else r.failed.get(name, "–")
        rates = [c["tokens"] / c["seconds"] for c in r.cells if c["kind"] == "pair" and c["method"] == name and values]
        columns = [
            method.label,
            ratio,
            _number(median(values) / lora if values and lora else None),
            f"{median(rates):,.0f}" if rates else "–",
            "–" if peak is None else f"{peak / 2**20:,.0f}" + (f" ({peak / lora_memory:.2f})" if lora_memory else ""),
            *_agreement(r, name),
        ]
        lines.append("| " + " | ".join(columns) + " |")
    return "\n".join(lines)


def _agreement(r: Results, name: str) -> tuple[str, str, str]:
    """Pearson, Spearman and the largest error, as a share of the largest score, against per-example autograd."""
    exact, found = r.scores.get("autograd"), r.scores.get(name)
    if exact is None or found is None or not ALL[name].exact or name == "autograd" or len(exact) < 3:
        return ("–", "–", "–")
    error = np.abs(found - exact).max() / np.abs(exact).max()
    rank = float(np.asarray(spearmanr(exact, found))[0])
    return f"{np.corrcoef(exact, found)[0, 1]:.6f}", f"{rank:.4f}", f"{error:.0e}"


def _growth_table(r: Results) -> str:
    lines = ["| exponent of time in | " + " | ".join(AXES) + " |", "|---" * (len(AXES) + 1) + "|"]
    for name, method in ALL.items():
        fitted = [exponent(r, axis, name) for axis in AXES]
        if any(value is not None for value in fitted):
            cells = [f"{_number(v)}{_span(r, axis, name)}" for axis, v in zip(AXES, fitted)]
            lines.append(f"| {method.label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _span(r: Results, axis: str, name: str) -> str:
    x = [point[0] for point in curve(r, axis, name)]
    if len(x) < 2:
        return ""
    low, high = (f"{v / 1e6:.0f}M" if axis == "size" else f"{v:,.0f}" for v in (x[0], x[-1]))
    return f" ({low}–{high})"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


HEAD = """# What scoring costs

Made by `make bench` (`python -m benchmarks report` makes it again from `docs/results/performance/*.jsonl`); not to be
edited. Ratios, not seconds: the unit is one forward pass without gradients over the same rows, with logits at response
tokens only, timed right before or after each method; the median of the repeats is given, and their range. An exponent
well below 1 means that what does not grow still outweighs what does.

![time, memory and growth]({picture})
"""

TAIL = f"""## How it is measured

- **Rows**: AG News with one-word labels, Alpaca, GSM8K, DialogSum, refusals, AdvBench requests with openings, and long
  chats (Alpaca's pairs one after the other), from the folder that `GRADSHIELD_DATA` names. One probe (the
  first bundled one), S of eq. 5, the Linears of the decoder. Batches are by token budget, the same for every method
  that knows one; LoRA takes 8 rows a step (`gradshield tune`'s settings, so without the gradient checkpointing that is
  TRL's own default and takes less memory and more time; TRL's training clock, no checkpoint written),
  kronfluence 4 (8 on a GPU).
- **Not timed**: what is there before rows are seen (loading, the probe's gradient, wrapping). kronfluence offers no way
  to keep the query's gradient, so its time holds it once. Nor is the first call of a method, on one row.
- **Memory**: the high-water mark of a fresh process less what is resident once the model and all libraries are loaded;
  on a GPU, of the allocator. It holds the probe's gradient, whatever its form. Methods that batch by tokens get as many
  at once as a LoRA step has, eight of the longest rows (kronfluence its four). On a CPU a part of every figure is holes
  that the C library keeps between tensors. The times are of batches of
  2,048 tokens (of 8,192 on a GPU).
- **Agreement**: with per-example autograd, row by row, over the same rows; errors as a share of the largest score. The
  normalised score is an estimate, whose error [the levers](results/README.md#levers-llamacpp) have. In
  bfloat16 every way to the score differs from autograd by the rounding of activations and gradients.
- **Growth**: exponents are slopes of log time over log x, each fitted on the span given with it. Rows are pieces of
  {SHORT} tokens of the chats (equal in number and kind for all, fewer for the slow methods); length is time per row at
  the same number of tokens; probes share one gradient, recompressed; what takes less than
  20 seconds is timed three times, of which the median counts; size is random weights in Llama's shape.

### The peers, and why their numbers are ours

All peers give FIHS itself, same sign and same scale, because each is told the same loss and S:

- **bergson** is called as `bergson score` calls itself (`collect_gradients` with a `Scorer`), with
  `loss_reduction="mean"` (its default is the sum over tokens). The query that it is given is ∇S as matrices, made
  before the clock starts. *per token* is its `attribute_tokens`, the tokens' scores summed.
- **kronfluence** is called as in its example for language models, with the identity for the Hessian. Its measurement is
  S, its training loss the sum of the rows' means. *rank {LOW_RANK}* is its query batching. Where a Linear has a bias,
  kronfluence adds the bias' gradient to the score (Qwen's q, k and v), which the others leave out.
- Both compute the logits of every token; both are given rows sorted by length, and no attention mask, which a causal
  model padded on the right does not need.
"""
