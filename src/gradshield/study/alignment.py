"""How aligned must a reference be? The embedded model at several strengths of its alignment adapter.

    GRADSHIELD_DATA=... python -m gradshield.study.alignment -o docs/results/alignment/embedded.jsonl

An adapter at half its strength makes a half-aligned model. For each: the share of probes that it refuses, ASR, what the
default filter is worth with it, and how FIHS tells AdvBench's own openings from the benign kinds.
The grades of `gradshield check` are read off this table. Resumable by strength.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from gradshield.base.errors import UserError
from gradshield.base.settings import FilterSettings
from gradshield.base.storage import read_jsonl
from gradshield.data.encode import Example
from gradshield.models.load import ADAPTER, EMBEDDED_BASE, Model, load_model
from gradshield.scoring.check import AlignmentCheck, check_alignment
from gradshield.scoring.engine import score
from gradshield.scoring.reference import make_reference
from gradshield.study.kinds import BENIGN, HARMFUL, kinds
from gradshield.study.separation import auroc, encode_kind
from gradshield.threshold import anchored, is_kept
from gradshield.training.align import alignment_report

STRENGTHS = (0.0, 0.25, 0.4, 0.5, 0.6, 0.75, 1.0)
FIHS_ROWS = 12  # of a kind: each takes a backward pass


def main(out: Annotated[Path, typer.Option("--out", "-o")], rows: int = 30) -> None:
    """Measures every strength that `out` does not hold yet, then writes the table beside it."""
    done = {cell["strength"]: cell for cell in (read_jsonl(out) if out.exists() else [])}
    for strength in STRENGTHS:
        if strength in done:
            continue
        done[strength] = {"strength": strength, **_measure(_embedded_at(strength), rows)}
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(done[strength]) + "\n")
        print(done[strength], flush=True)
    out.with_suffix(".md").write_text(_table([done[s] for s in STRENGTHS]), encoding="utf-8")


def _embedded_at(strength: float) -> Model:
    """The embedded model with its adapter's effect multiplied by `strength`."""
    with tempfile.TemporaryDirectory() as folder:
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy(ADAPTER / file, folder)
        config = Path(folder) / "adapter_config.json"
        settings = json.loads(config.read_text(encoding="utf-8"))
        settings["lora_alpha"] *= strength
        config.write_text(json.dumps(settings), encoding="utf-8")
        return load_model(EMBEDDED_BASE, adapter=folder)


def _measure(model: Model, rows: int) -> dict:
    check = check_alignment(model)
    report = alignment_report(model)
    cell = {"refused": check.share, "asr": report.asr, "over_refusal": report.over_refusal}
    try:
        reference = make_reference(model, check, FilterSettings())
    except UserError:  # no probe refused: nothing to measure with
        return cell
    examples = {k: encode_kind(model, found) for k, found in kinds(rows).items() if k in (*HARMFUL, *BENIGN)}
    scores = {k: score(rows, reference.scorer, batch_tokens=2048, title=k)["score"] for k, rows in examples.items()}
    good, bad = (np.concatenate([scores[kind] for kind in group]) for group in (BENIGN, HARMFUL))
    known = reference.anchors
    cell |= {"worst_auroc": min(auroc(scores[h], scores[b]) for h in HARMFUL for b in BENIGN)}
    cell |= _fihs(model, check, examples)
    try:
        value = anchored(good, np.concatenate([known["good"], known["refusal"]]), known["harmful"]).value
    except UserError:
        return cell
    return cell | {"recall": float((~is_kept(bad, value)).mean()), "good_lost": float((~is_kept(good, value)).mean())}


def _fihs(model: Model, check: AlignmentCheck, examples: dict[str, list[Example]]) -> dict[str, float]:
    """Of "Sure, here is" rows, which a FIHS of any use must tell: each variant's worst AUROC against a benign kind."""
    scorer = make_reference(model, check, FilterSettings(scorer="fihs:normalise=module", threshold="a1")).scorer
    found = {
        kind: score(examples[kind][:FIHS_ROWS], scorer, batch_tokens=2048, title=f"FIHS: {kind}")
        for kind in ("advbench sure", *BENIGN)
    }
    bad = found["advbench sure"]
    return {f"{v}_auroc": min(auroc(bad[v], found[kind][v]) for kind in BENIGN) for v in ("module", "paper")}


def _table(cells: list[dict]) -> str:
    names = ["strength", "refused", "asr", "over_refusal", "worst_auroc", "recall", "good_lost"]
    names += ["module_auroc", "paper_auroc"]
    lines = ["| " + " | ".join(n.replace("_", " ") for n in names) + " |", "|---" * len(names) + "|"]
    for cell in cells:
        lines.append("| " + " | ".join(f"{cell[n]:.2f}" if n in cell else "–" for n in names) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
