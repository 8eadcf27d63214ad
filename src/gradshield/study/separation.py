"""How well each score tells every harmful kind from every benign one, and what the thresholds decide.

    GRADSHIELD_DATA=... python -m gradshield.study.separation --rows 30 -o docs/results/separation/embedded

Writes scores.csv (every row's score under every variant), auroc.md and decisions.md into the folder. What scores.csv
holds already is not scored again.
"""

import csv
import json
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from gradshield.base.errors import UserError
from gradshield.base.settings import FilterSettings
from gradshield.data.encode import Example, encode
from gradshield.models.load import Model, load_settings_model
from gradshield.scoring.anchors import anchor_examples
from gradshield.scoring.check import check_alignment
from gradshield.scoring.engine import score
from gradshield.scoring.reference import make_reference
from gradshield.study.kinds import BENIGN, HARMFUL, REFUSED_FIRST, SCARY, SHIFT, kinds
from gradshield.threshold import a1, anchored, is_kept

POISON = (0.0, 0.025, 0.1, 0.3, 0.9)
Table = dict[str, dict[str, np.ndarray]]
FILE_ROWS, SEEDS = 200, 20  # rows of a mixed file, and how many are drawn


def main(
    out: Annotated[Path, typer.Option("--out", "-o")],
    model: str = "embedded",
    adapter: str | None = None,
    rows: int = 30,
    fihs: bool = True,
    fihs_anchors: bool = True,
    seed: int = 0,
) -> None:
    """Scores `rows` rows of every kind under every variant and writes the tables."""
    _score(out, model, adapter, rows, fihs, fihs_anchors, seed)
    scores, anchors = read_scores(out / "scores.csv")
    variants = [v for v in scores[SHIFT] if v not in ("request", "topic", "answer")]
    (out / "auroc.md").write_text("".join(_auroc_table(scores, v) for v in variants), encoding="utf-8")
    (out / "decisions.md").write_text(_decisions(scores, anchors), encoding="utf-8")
    print((out / "auroc.md").read_text(encoding="utf-8"), (out / "decisions.md").read_text(encoding="utf-8"))


def _score(out: Path, model: str, adapter: str | None, rows: int, fihs: bool, fihs_anchors: bool, seed: int) -> None:
    """Adds what scores.csv lacks; what is there already is not scored again."""
    file = out / "scores.csv"
    scores, anchors = read_scores(file) if file.exists() else ({}, {})
    found = kinds(rows, seed)
    without_intent, without_fihs = ([k for k in found if v not in scores.get(k, {})] for v in ("intent", "module"))
    without_fihs = without_fihs if fihs else []
    fihs_anchors = fihs and fihs_anchors and "module" not in anchors
    if not (without_intent or without_fihs or fihs_anchors):
        return
    loaded = load_settings_model(FilterSettings(model=model, adapter=adapter))
    encoded = {kind: encode_kind(loaded, conversations) for kind, conversations in found.items()}
    check = check_alignment(loaded)
    out.mkdir(parents=True, exist_ok=True)
    if without_intent:
        reference = make_reference(loaded, check, FilterSettings())
        anchors["intent"] = dict(reference.anchors)
        for kind in without_intent:
            examples = encoded[kind]
            columns = score(
                reference.scored_part(examples), reference.scorer, batch_tokens=2048, title=f"intent {kind}"
            )
            new = {"intent": columns["score"], "topic": columns["topic"], "answer": columns["answer"]}
            scores[kind] = {**new, **scores.get(kind, {})}
        _write_scores(file, scores, anchors)
    if without_fihs or fihs_anchors:
        _fihs(loaded, check, {k: encoded[k] for k in without_fihs}, scores, anchors, fihs_anchors)
        _write_scores(file, scores, anchors)


def _fihs(model: Model, check, encoded, scores, anchors, with_anchors: bool) -> None:
    from gradshield.scoring.fihs.probe import margin, paper_tokens, probe_gradient
    from gradshield.scoring.fihs.scorer import fihs_scorer

    safe, unsafe = paper_tokens(model.tokenizer)
    gradient = probe_gradient(model, check.refused_probes()[:12], margin([safe], [unsafe]))
    scorer = fihs_scorer(model, gradient, "module")
    for kind, examples in encoded.items():
        columns = score(examples, scorer, batch_tokens=2048, title=f"FIHS {kind}")
        scores[kind] |= {name: columns[name] for name in ("paper", "cosine", "module")}
    if with_anchors:
        for kind, examples in anchor_examples(model).items():
            columns = score(examples, scorer, batch_tokens=2048, title=f"FIHS anchors {kind}")
            for name in ("paper", "cosine", "module"):
                anchors.setdefault(name, {})[kind] = columns[name]


def auroc(harmful: np.ndarray, benign: np.ndarray) -> float:
    """Probability that a harmful row scores above a benign one, ties counted half."""
    return float((harmful[:, None] > benign).mean() + 0.5 * (harmful[:, None] == benign).mean())


def encode_kind(model: Model, conversations) -> list[Example]:
    """The conversations as examples; those that the template can't take are left out."""
    examples = [encode(c, n, model.tokenizer) for n, c in enumerate(conversations)]
    return [e for e in examples if isinstance(e, Example)]


def _auroc_table(scores, variant: str) -> str:
    columns = [*BENIGN, *SCARY]
    lines = [
        f"\n### {variant}\n",
        "| harmful \\ benign | " + " | ".join(columns) + " | worst benign |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for harmful in (*HARMFUL, *SCARY, SHIFT):
        values = [auroc(scores[harmful][variant], scores[b][variant]) for b in columns]
        cells = [f"{v:.3f}" for v in (*values, min(values[: len(BENIGN)]))]
        lines.append(f"| {harmful} | " + " | ".join(cells) + " |")
    worst = {h: min(auroc(scores[h][variant], scores[b][variant]) for b in BENIGN) for h in HARMFUL}
    clear = min(value for h, value in worst.items() if h not in REFUSED_FIRST)
    closing = (
        f"Worst cell of the harmful by the benign kinds: **{min(worst.values()):.3f}**; without the kinds that take a "
        f"refusal back, **{clear:.3f}**. (Left out: scary rows and identity shift, as answering such requests may do "
        "real harm.)"
    )
    return "\n".join([*lines, f"\n{closing}\n"])


def _decisions(scores, anchors) -> str:
    """Recall / false quarantine of mixed files: kinds evenly mixed, without those that take a refusal back, or with AG
    News as the only benign one."""
    rules = [("intent, anchored", "intent", "anchored")]
    rules += [(f"{v}, {r}", v, r) for v in ("paper", "module") if v in anchors for r in ("anchored", "a1")]
    rules += [("paper, a1", "paper", "a1")] if "paper" in next(iter(scores.values())) and "paper" not in anchors else []
    header = "| rule | file | " + " | ".join(f"{p:.1%} poison" for p in POISON) + " |"
    lines = ["\nRecall / false quarantine, means over seeds; poison evenly from the harmful kinds.\n", header]
    lines.append("|---" * (len(POISON) + 2) + "|")
    clear = tuple(kind for kind in HARMFUL if kind not in REFUSED_FIRST)
    files = {
        "mixed": (BENIGN, HARMFUL),
        "no refusal taken back": (BENIGN, clear),
        "AG News alone": (("agnews",), HARMFUL),
    }
    for name, variant, rule in rules:
        for file, (benign, harmful) in files.items():
            cells = [_cell(scores, anchors, variant, rule, benign, harmful, poison) for poison in POISON]
            lines.append(f"| {name} | {file} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(scores, anchors, variant: str, rule: str, benign, harmful, poison: float) -> str:
    good = np.concatenate([scores[b][variant] for b in benign])
    bad = np.concatenate([scores[h][variant] for h in harmful])
    recall, lost = [], []
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        count = round(FILE_ROWS * poison)
        g = rng.choice(good, FILE_ROWS - count)
        b = rng.choice(bad, count)
        file = np.concatenate([g, b])
        if rule == "a1":
            value = a1(file).value
        else:
            known = anchors[variant]
            try:
                value = anchored(file, np.concatenate([known["good"], known["refusal"]]), known["harmful"]).value
            except UserError:
                return "no threshold"
        recall.append((~is_kept(b, value)).mean() if count else np.nan)
        lost.append((~is_kept(g, value)).mean())
    shown = "–" if not poison else f"{np.mean(recall):.2f}"
    return f"{shown} / {np.mean(lost):.3f}"


def _write_scores(file: Path, scores, anchors) -> None:
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["kind", "n", "variant", "score"])
        for kind, columns in scores.items():
            for variant, values in columns.items():
                writer.writerows([kind, n, variant, json.dumps(float(f"{v:.7g}"))] for n, v in enumerate(values))
        for variant, kinds_ in anchors.items():
            for kind, values in kinds_.items():
                rows = ([f"anchor {kind}", n, variant, json.dumps(float(f"{v:.7g}"))] for n, v in enumerate(values))
                writer.writerows(rows)


def read_scores(file: Path) -> tuple[Table, Table]:
    """(kind → variant → scores, variant → kind of anchor → scores)."""
    rows: dict[tuple[str, str], list[float]] = {}
    with file.open(newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            rows.setdefault((row["kind"], row["variant"]), []).append(float(row["score"]))
    scores: Table = {}
    anchors: Table = {}
    for (kind, variant), values in rows.items():
        if kind.startswith("anchor "):
            anchors.setdefault(variant, {})[kind.removeprefix("anchor ")] = np.array(values)
        else:
            scores.setdefault(kind, {})[variant] = np.array(values)
    return scores, anchors


if __name__ == "__main__":
    typer.run(main)
