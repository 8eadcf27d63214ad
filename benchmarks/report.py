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
            "memory above the model, × LoRA's (the more expensive of raw and normalised)",
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
            f"{int(max((p[-1][0] for p in probes if p), default=64))} probes, × one (the more expensive)",
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

This page compares the time and memory of GradShield's scores with LoRA training and with other libraries. `make bench`
measures and writes it. `python -m benchmarks report` writes it again from `docs/results/performance/*.jsonl`. Do not
edit it by hand.

Times are ratios, not seconds. The unit is one forward pass without gradients over the same rows, with logits at
response tokens only. It is timed right before or after each method. The tables give the median of the repeats, and
their range. *Met* compares unrounded values. *Exponents* are slopes of log time over log size: 1 is linear.
Well below 1, fixed costs are still larger than the costs that grow.

The default score was measured here in an earlier version, which read up to 70 % of the layers. It now reads half of
them, which took .53 of a forward pass on the embedded model ([log](log.md)).

![time, memory and growth]({picture})
"""

TAIL = f"""## How it is measured

- **Rows**: AG News with one-word labels, Alpaca, GSM8K, DialogSum, refusals, AdvBench requests with openings, and long
  chats (Alpaca's pairs one after the other). They are read from the folder that `GRADSHIELD_DATA` names.
- **Score**: one probe (the first bundled one), S of eq. 5, the Linears of the decoder.
- **Batches**: filled by a token budget, which is the same for every method that has one. LoRA takes 8 rows per step,
  kronfluence 4 (8 on a GPU).
- **LoRA**: trained with the settings of `gradshield tune`, without gradient checkpointing. TRL's default is to use it,
  which takes less memory and more time. The time is from TRL's training clock. No checkpoint is written.
- **Not timed**: work that does not depend on the rows (loading, the probe's gradient, wrapping), and the first call of
  a method, on one row. kronfluence can't keep the query's gradient, so its time includes computing it once.
- **Memory**: the peak of a fresh process, minus the memory in use once the model and all libraries are loaded. On a GPU
  it is the allocator's peak. It includes the probe's gradient, whatever its form. Methods that batch by tokens get as
  many tokens at once as a LoRA step has: eight of the longest rows. kronfluence gets its four. On a CPU, part of every
  figure is heap fragmentation: gaps between tensors that the C library keeps.
- **Time**: measured with batches of 2,048 tokens (8,192 on a GPU).
- **Agreement**: with per-example autograd, row by row, over the same rows. Errors are a share of the largest score. The
  normalised score is an estimate; [the levers](results/README.md#levers-llamacpp) give its error. In bfloat16, every
  method differs from autograd by the rounding of activations and gradients.
- **Growth**: exponents are slopes of log time over log x. Each is fitted on the range given with it. A measurement of
  less than 20 seconds is repeated three times, and the median counts.
    - *rows*: pieces of {SHORT} tokens of the chats, equal in number and kind for all methods, but fewer for the slow
      ones.
    - *length*: time per row at the same number of tokens.
    - *probes*: all probes share one gradient, which is recompressed.
    - *size*: random weights in Llama's shape.

### The peers, and why their scores equal ours

All peers compute FIHS itself, with the same sign and scale, because each gets the same loss and S:

- **bergson** is called as its command `bergson score` does it: `collect_gradients` with a `Scorer`. The loss is set
  to `loss_reduction="mean"`; its default is the sum over tokens. Its query is ∇S as matrices, made before the clock
  starts. *per token* is its `attribute_tokens`, with the tokens' scores summed.
- **kronfluence** is called as in its example for language models, with the identity for the Hessian. Its measurement is
  S, and its training loss is the sum of the rows' means. *rank {LOW_RANK}* is its query batching. Where a Linear has
  a bias (Qwen's q, k and v), kronfluence adds the gradient of the bias to the score. The others leave it out.
- Both compute the logits of every token. Both get rows sorted by length, and no attention mask: a causal model with
  padding on the right does not need one.
"""
