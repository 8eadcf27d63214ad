"""What a score finds and loses among rows with real full answers and requests in every dress.

    GRADSHIELD_DATA=... python -m gradshield.study.real --scorer intent -o docs/results/real/embedded

Writes scores.csv (every row, and the anchors) and a table per scorer into the folder. A scorer whose rows are already
in scores.csv is not run again. Any registered scorer can take part.
"""

import csv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from gradshield.base.settings import FilterSettings
from gradshield.data.encode import Example, encode
from gradshield.evaluation.safety import wilson
from gradshield.models.load import load_settings_model
from gradshield.scoring.check import check_alignment
from gradshield.scoring.engine import score
from gradshield.scoring.reference import make_reference
from gradshield.study.real_kinds import Kind, real_kinds
from gradshield.study.separation import auroc
from gradshield.threshold import Threshold, anchored, is_kept

LONGEST = 600  # tokens of a row: longer ones are cut
LETTERS = ("zero-width", "full-width", "look-alikes", "spaced", "leetspeak")
FILES = {
    "ordinary rows": ("ordinary",),
    "ordinary rows and refusals": ("ordinary", "refusal"),
    "these and real answers": ("ordinary", "refusal", "real"),
    "these, openings and dresses": ("ordinary", "refusal", "real", "opening", "dress"),
}
HEADER = ("scorer", "group", "kind", "harmful", "n", "score", "reason")


def main(
    out: Annotated[Path, typer.Option("--out", "-o")],
    scorer: Annotated[list[str], typer.Option()],
    model: str = "embedded",
    rows: int = 50,
    dressed: int = 16,
    ordinary: int | None = None,
    seed: int = 3,
) -> None:
    """Scores the rows with every scorer named and writes the tables. `ordinary` is the number of ordinary rows and
    refusals of each kind, where more are wanted than `rows`: few of them are lost."""
    table = scored_table(out, scorer, model, lambda: real_kinds(rows, dressed, seed, ordinary))
    for name in scorer:
        text = summary([line for line in table if line["scorer"] == name], name)
        (out / f"{name.split(':')[0]}.md").write_text(text, encoding="utf-8")
        print(text)


def scored_table(
    out: Path, scorers: Sequence[str], model: str, make_kinds: Callable[[], Sequence[Kind]]
) -> list[dict[str, str]]:
    """The lines of scores.csv in `out`, to which the kinds' rows and the anchors are added for each scorer that it
    lacks."""
    file = out / "scores.csv"
    table = read_scored(file)
    missing = [name for name in scorers if name not in {line["scorer"] for line in table}]
    if missing:
        found = make_kinds()
        loaded = load_settings_model(FilterSettings(model=model))
        check = check_alignment(loaded)
        out.mkdir(parents=True, exist_ok=True)
        for name in missing:
            settings = FilterSettings(model=model, scorer=name)
            reference = make_reference(loaded, check, settings)
            for kind, values in reference.anchors.items():
                table += [scored_line(name, "anchor", kind, kind == "harmful", n, v, "") for n, v in enumerate(values)]
            table += _scored(name, found, reference, loaded.tokenizer)
            write_scored(file, table)
    return table


def _scored(name: str, kinds: Sequence[Kind], reference, tokenizer) -> list[dict[str, str]]:
    placed = []
    for kind in kinds:
        for n, conversation in enumerate(kind.rows):
            example = encode(conversation, n, tokenizer, max_length=LONGEST)
            if isinstance(example, Example):
                placed.append((kind, n, example))
    found = score(reference.scored_part([e for *_, e in placed]), reference.scorer, batch_tokens=1024)
    return [
        scored_line(name, kind.group, kind.name, kind.harmful, n, value, found.reasons.get(at, ""))
        for at, ((kind, n, _), value) in enumerate(zip(placed, found["score"]))
    ]


def summary(lines: Sequence[dict[str, str]], name: str) -> str:
    """Markdown: the totals by group, then every kind, at the anchored threshold."""
    rows = [line for line in lines if line["group"] != "anchor"]
    known = {
        k: score_values([x for x in lines if (x["group"], x["kind"]) == ("anchor", k)])
        for k in ("good", "refusal", "harmful")
    }
    good = np.concatenate([known["good"], known["refusal"]])
    ordinary = score_values([x for x in rows if x["group"] == "ordinary"])
    threshold = anchored(score_values(rows), good, known["harmful"])
    plain = [x for x in rows if x["group"] == "dress" and x["kind"] not in LETTERS]
    groups = {
        "harmful, real answers": [x for x in rows if x["group"] == "real"],
        "harmful, openings": [x for x in rows if x["group"] == "opening"],
        "harmful, dressed in words": [x for x in plain if x["harmful"] == "1"],
        "harmful, letters hidden": [x for x in rows if x["kind"] in LETTERS and x["harmful"] == "1"],
        "harmful, eight languages": [x for x in rows if x["group"] == "language" and x["harmful"] == "1"],
        "ordinary rows": [x for x in rows if x["group"] == "ordinary"],
        "refusals": [x for x in rows if x["group"] == "refusal"],
        "harmless, dressed in words": [x for x in plain if x["harmful"] == "0"],
        "harmless, letters hidden": [x for x in rows if x["kind"] in LETTERS and x["harmful"] == "0"],
        "harmless, eight languages": [x for x in rows if x["group"] == "language" and x["harmful"] == "0"],
        "disputed": [x for x in rows if x["group"] == "disputed"],
    }
    text = [f"### {name}\n", f"Threshold {threshold.value:+.2f} (anchored).\n"]
    text += ["| rows | number | quarantined [95 %] | set aside | AUROC against ordinary rows |", "|---" * 5 + "|"]
    text += [group_cells(group, found, threshold, ordinary) for group, found in groups.items() if found]
    text += [
        "",
        "| a file of | good rows lost: expected | lost | harmful rows kept: expected | kept |",
        "|---" * 5 + "|",
    ]
    for name, parts in FILES.items():
        text.append(f"| {name} | " + " | ".join(_errors([x for x in rows if x["group"] in parts], good, known)) + " |")
    text.append("")
    pairs = [
        (k, [x for x in rows if x["kind"] == k and x["harmful"] == "1"]) for k in dict.fromkeys(x["kind"] for x in rows)
    ]
    benign = [x for x in rows if x["group"] in ("ordinary", "refusal")]
    worst = min(
        (auroc(score_values(bad), score_values([x for x in benign if x["kind"] == other])), kind, other)
        for kind, bad in pairs
        for other in {x["kind"] for x in benign}
        if bad and bad[0]["group"] in ("real", "opening")
    )
    text.append(f"Worst AUROC of a pair of kinds: {worst[0]:.3f} ({worst[1]} against {worst[2]}).\n")
    text += ["| kind | harmful: quarantined | set aside | harmless: quarantined | set aside |", "|---" * 5 + "|"]
    for kind in dict.fromkeys(x["kind"] for x in rows):
        sides = [[x for x in rows if x["kind"] == kind and x["harmful"] == side] for side in ("1", "0")]
        cells = [cell for side in sides for cell in _short(side, threshold)]
        text.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(text) + "\n"


def group_cells(group: str, found: Sequence[dict[str, str]], threshold: Threshold, ordinary: np.ndarray) -> str:
    aside = sum(bool(x["reason"]) for x in found)
    values = score_values(found)
    if not len(values):
        return f"| {group} | {len(found)} | – | 1.00 | – |"
    over = int((~is_kept(values, threshold.value)).sum())
    low, high = wilson(over, len(values))
    known = f"{auroc(values, ordinary):.3f}" if group.startswith("harmful") else "–"
    share = f"{over / len(values):.3f} [{low:.3f}, {high:.3f}]"
    return f"| {group} | {len(found)} | {share} | {aside / len(found):.2f} | {known} |"


def _errors(found: Sequence[dict[str, str]], good: np.ndarray, known: dict[str, np.ndarray]) -> Iterator[str]:
    """Expected and real numbers of good rows lost and of harmful rows kept, in a file of these rows."""
    threshold = anchored(score_values(found), good, known["harmful"])
    for expected, side in ((threshold.good_lost, "0"), (threshold.harmful_kept, "1")):
        values = score_values([x for x in found if x["harmful"] == side])
        wrong = is_kept(values, threshold.value) == (side == "1")
        yield f"{expected:.1f}"
        yield f"{wrong.sum()} of {len(values)}"


def _short(found: Sequence[dict[str, str]], threshold: Threshold) -> tuple[str, str]:
    if not found:
        return "", ""
    values = score_values(found)
    aside = sum(bool(x["reason"]) for x in found)
    return (
        f"{(~is_kept(values, threshold.value)).mean():.2f} of {len(values)}" if len(values) else "–"
    ), f"{aside}" if aside else ""


def score_values(lines: Sequence[dict[str, str]]) -> np.ndarray:
    """Scores of the lines that have one."""
    return np.array([float(x["score"]) for x in lines if not x["reason"]])


def scored_line(name: str, group: str, kind: str, harmful: bool, n: int, value: float, reason: str) -> dict[str, str]:
    """A line of a scores.csv."""
    return dict(zip(HEADER, (name, group, kind, str(int(harmful)), str(n), f"{value:.6g}", reason)))


def read_scored(file: Path) -> list[dict[str, str]]:
    """The lines of a scores.csv; none where it is missing."""
    if not file.exists():
        return []
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def write_scored(file: Path, table: Sequence[dict[str, str]]) -> None:
    """Writes a scores.csv."""
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer: csv.DictWriter[str] = csv.DictWriter(stream, list(HEADER))
        writer.writeheader()
        writer.writerows(table)


if __name__ == "__main__":
    typer.run(main)
