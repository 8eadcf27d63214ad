"""Scores and decisions → kept, quarantined and set aside, written again; run.yaml says which rows a person moved.

All of it follows from scores.parquet and review.sqlite, so a call that was killed at any moment is simply repeated.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gradshield.base.storage import write_whole
from gradshield.data import write_outputs
from gradshield.data.run_folder import catch_write_errors, read_run, read_table, run_lock, source_of_run, write_run
from gradshield.report.filter_report import report_run
from gradshield.review.store import Decision, decisions_in_force
from gradshield.review.verdicts import VERDICTS, Judged, Scores, judge, own_threshold, read_scores, threshold_in_force


def apply_decisions(out: Path) -> dict[str, Any]:
    """Writes the run's files by its scores, its threshold or a person's, and the decisions that stand.

    Returns the counts by verdict, the rows that a person moved and those that a moved threshold moved. Without
    decisions the files are those that `filter` wrote. Raises UserError when the input is not what was filtered.
    """
    saved = read_run(out)
    with run_lock(out):
        scores = read_scores(out, saved["summary"]["rows"])
        source = source_of_run(saved)
        if not source.folder:  # the name may have been another's, a link's, when the run was made
            source = replace(source, names=(scores.place[0].rpartition(":")[0],))
        decisions = {row: d for row, d in decisions_in_force(out).items() if row <= len(scores.score)}
        judged = judge(scores, threshold_in_force(saved, decisions), decisions)
        verdicts = [VERDICTS[code] for code in judged.verdict]
        reasons = {int(n): scores.reasons[scores.reason[n]] for n in np.flatnonzero(scores.reason >= 0)}
        counts = write_outputs(source, verdicts, reasons, out)
        with catch_write_errors(out):
            _write_verdicts(out, verdicts)
            review = _review(saved, scores, judged, decisions, counts)
            rest = {part: content for part, content in saved.items() if part != "review"}
            content = {**rest, "review": review} if decisions else rest
            report_run(out, content, source)
            write_run(out, content)
    return {
        **{name.replace(" ", "_"): count for name, count in counts.items()},
        "moved_by_a_person": len(review["moved"]),
        "moved_by_the_threshold": review["moved_by_the_threshold"],
    }


def _review(
    saved: Mapping[str, Any],
    scores: Scores,
    judged: Judged,
    decisions: Mapping[int, Decision],
    counts: Mapping[str, int],
) -> dict[str, Any]:
    """What run.yaml says of the review: with the scores, enough to tell why each row is where it is."""
    own = judge(scores, own_threshold(saved), {}).verdict
    moved = [row for row in decisions if row and judged.verdict[row - 1] != judged.by_score[row - 1]]
    threshold: dict[str, Any] = {"value": judged.threshold if np.isfinite(judged.threshold) else None}
    if 0 in decisions:
        threshold |= {"who": decisions[0].who, "when": decisions[0].at}
    return {
        "threshold": threshold,
        **{name.replace(" ", "_"): count for name, count in counts.items()},
        "decided": sum(row > 0 for row in decisions),
        "moved_by_the_threshold": int((judged.by_score != own).sum()),
        "moved": [
            {"row": row, "to": d.verdict, "who": d.who, "when": d.at, **({"note": d.note} if d.note else {})}
            for row, d in ((row, decisions[row]) for row in moved)
        ],
    }


def _write_verdicts(out: Path, verdicts: list[str]) -> None:
    """scores.parquet with these verdicts, whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = read_table(out)
    place = table.column_names.index("verdict")
    with write_whole(out / "scores.parquet") as stream:
        pq.write_table(table.set_column(place, "verdict", pa.array(verdicts, pa.string())), stream)
