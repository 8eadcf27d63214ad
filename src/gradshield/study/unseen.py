"""What a score finds and loses in dresses, among ordinary rows and among harmful rows in everyday voices, all of which
others wrote and no decision was made on.

    GRADSHIELD_DATA=... python -m gradshield.study.unseen -o docs/results/unseen/embedded

The dresses are around other requests than those of `study.real`. Writes scores.csv and a table into the folder.
"""

from collections import defaultdict
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from gradshield.base.storage import read_jsonl
from gradshield.data.formats import Conversation, Message
from gradshield.study.kinds import OPENINGS, load_public
from gradshield.study.real import group_cells, score_values, scored_table
from gradshield.study.real_kinds import SHORTENED, Kind, answered_goals
from gradshield.study.separation import auroc
from gradshield.study.unseen_dresses import DRESSES, GROUPS
from gradshield.threshold import anchored

SEED = 23  # of the requests


def main(
    out: Annotated[Path, typer.Option("--out", "-o")],
    scorer: str = "intent",
    model: str = "embedded",
    dressed: int = 16,
) -> None:
    """Scores `dressed` harmful and as many harmless requests in every dress, and the rows."""
    table = scored_table(out, [scorer], model, lambda: unseen_kinds(dressed))
    text = _table([line for line in table if line["scorer"] == scorer])
    (out / f"{scorer.split(':')[0]}.md").write_text(text, encoding="utf-8")
    print(text)


def unseen_kinds(dressed: int) -> list[Kind]:
    """Every dress has requests of its own, as long as they last. Half of the harmful ones have real answers, half
    openings; the harmless ones are Alpaca's imperatives."""
    broken = [a for a in load_public("jbb_artifacts_pair_jbc", SEED) if a["jailbroken"] and a["response"]]
    answered = answered_goals(broken, len(broken))
    asked = [
        (r["prompt"], r["target"] if n % 2 else OPENINGS[n % len(OPENINGS)])
        for n, r in enumerate(load_public("advbench", SEED))
    ]
    short = [r for r in load_public("alpaca_en_demo", SEED) if not r["input"] and len(r["instruction"]) < 200]
    alpaca = [(r["instruction"], r["output"][:SHORTENED]) for r in short]
    found = []
    for place, (name, dress) in enumerate(DRESSES.items()):
        half = dressed // 2
        harmful = _part(answered, place, half) + _part(asked, place, dressed - half)
        for side, rows in ((True, harmful), (False, _part(alpaca, place, dressed))):
            worn = [_conversation(dress(request, answer, n)) for n, (request, answer) in enumerate(rows)]
            found.append(Kind(name, GROUPS[name], side, worn))
    plain: dict[tuple[str, bool], list[Conversation]] = defaultdict(list)
    for record in read_jsonl(files("gradshield.study").joinpath("unseen_rows.jsonl")):
        plain[record["kind"], record["harmful"]].append(_conversation(record["messages"]))
    return found + [
        Kind(name, "everyday" if harmful else "ordinary", harmful, rows) for (name, harmful), rows in plain.items()
    ]


def _part(rows: Sequence[tuple[str, str]], place: int, count: int) -> list[tuple[str, str]]:
    """The `place`-th lot of `count` rows, from the start again when they are used up."""
    return [rows[n % len(rows)] for n in range(place * count, (place + 1) * count)]


def _conversation(turns: list[dict[str, str]]) -> Conversation:
    return Conversation(tuple(Message(turn["role"], turn["content"]) for turn in turns))


def _table(lines: list[dict[str, str]]) -> str:
    rows = [line for line in lines if line["group"] != "anchor"]
    known = {kind: score_values([x for x in lines if x["kind"] == kind]) for kind in ("good", "refusal", "harmful")}
    good = np.concatenate([known["good"], known["refusal"]])
    threshold = anchored(score_values(rows), good, known["harmful"])
    ordinary = score_values([x for x in rows if x["group"] == "ordinary"])
    harmful, harmless = ([x for x in rows if x["harmful"] == side] for side in ("1", "0"))
    text = [f"Threshold {threshold.value:+.2f} (anchored).\n"]
    text += ["| rows | number | quarantined [95 %] | set aside | AUROC against ordinary rows |", "|---" * 5 + "|"]
    for group in dict.fromkeys(GROUPS.values()):
        for side, found in (("harmful", harmful), ("harmless", harmless)):
            own = [x for x in found if x["group"] == group]
            text.append(group_cells(f"{side}, dressed: {group}", own, threshold, ordinary))
    dressed = [[x for x in found if x["group"] in GROUPS.values()] for found in (harmful, harmless)]
    everyday = [x for x in harmful if x["group"] == "everyday"]
    text.append(group_cells("harmful, dressed, all", dressed[0], threshold, ordinary))
    text.append(group_cells("harmless, dressed, all", dressed[1], threshold, ordinary))
    text.append(group_cells("harmful, everyday voices", everyday, threshold, ordinary))
    text.append(group_cells("ordinary rows", [x for x in rows if x["group"] == "ordinary"], threshold, ordinary))
    text.append(
        f"\nAUROC of all harmful against all harmless rows: {auroc(score_values(harmful), score_values(harmless)):.4f}."
    )
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    typer.run(main)
