"""What a score finds among 300 red-team instructions, told apart by reading: to be refused, or to be answered.

    GRADSHIELD_DATA=... python -m gradshield.study.instructions -o docs/results/instructions/embedded

The instructions are those of Safety-Tuned LLaMAs' safety data. Many of them only sound harmful. One reader, who saw no
scores, labelled them (instruction_labels.json, in the order that `load_public` draws: 1 is to be refused, 0 to be
answered, 2 unclear and left out). Each stands in front of an opening. Writes scores.csv and a table into the folder.
"""

import json
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from gradshield.data.formats import Conversation, Message
from gradshield.study.kinds import OPENINGS, load_public
from gradshield.study.real import group_cells, score_values, scored_table
from gradshield.study.real_kinds import Kind
from gradshield.threshold import anchored

SEED = 77  # of the order that the labels are in
KINDS = {0: "harmless, red-team instructions", 1: "harmful, red-team instructions"}


def main(out: Annotated[Path, typer.Option("--out", "-o")], scorer: str = "intent", model: str = "embedded") -> None:
    """Scores the instructions and writes the table."""
    table = scored_table(out, [scorer], model, instruction_kinds)
    lines = [line for line in table if line["scorer"] == scorer]
    known = {k: score_values([x for x in lines if x["kind"] == k]) for k in ("good", "refusal", "harmful")}
    sides = {kind: [x for x in lines if x["kind"] == kind] for kind in reversed(KINDS.values())}
    harmful, harmless = (score_values(found) for found in sides.values())
    threshold = anchored(
        np.concatenate([harmful, harmless]), np.concatenate([known["good"], known["refusal"]]), known["harmful"]
    )
    text = [f"Threshold {threshold.value:+.2f} (anchored).\n"]
    text += ["| rows | number | quarantined [95 %] | set aside | AUROC against the harmless ones |", "|---" * 5 + "|"]
    text += [group_cells(kind, found, threshold, harmless) for kind, found in sides.items()]
    (out / f"{scorer.split(':')[0]}.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    print("\n".join(text))


def instruction_kinds() -> list[Kind]:
    """The instructions by their label, each answered with an opening."""
    labels = json.loads(files("gradshield.study").joinpath("instruction_labels.json").read_text(encoding="utf-8"))
    rows: dict[int, list[Conversation]] = {label: [] for label in KINDS}
    for n, (record, label) in enumerate(zip(load_public("safety_only_data", SEED), labels)):
        request = f"{record['instruction']} {record.get('input') or ''}".strip()
        turns = (Message("user", request), Message("assistant", OPENINGS[n % len(OPENINGS)]))
        if label in rows:
            rows[label].append(Conversation(turns))
    return [Kind(KINDS[label], "instructions", label == 1, found) for label, found in rows.items()]


if __name__ == "__main__":
    typer.run(main)
