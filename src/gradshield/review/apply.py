"""Scores and decisions → kept, quarantined and set aside, written again; run.yaml says which rows a person moved.

All of it follows from scores.parquet and review.sqlite, so an interrupted call can be repeated.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from gradshield.base.errors import UserError
from gradshield.base.storage import write_whole
from gradshield.data import read_rows, write_outputs
from gradshield.data.run_folder import (
    SavedRun,
    catch_write_errors,
    read_run,
    read_table,
    run_lock,
    source_of_run,
    write_run,
)
from gradshield.data.summaries import MovedRow, ReviewedThreshold, ReviewSummary
from gradshield.report.filter_report import report_run
from gradshield.review import store
from gradshield.review.store import Decision
from gradshield.review.verdicts import (
    VERDICTS,
    Judged,
    RunScores,
    judge,
    own_threshold,
    read_run_scores,
    threshold_in_force,
)
from gradshield.screen.train_script import note_of_kept, trl_form


@dataclass(frozen=True)
class Applied:
    """The rows of each verdict after a review, and how many of them moved."""

    kept: int
    quarantined: int
    set_aside: int
    moved_by_a_person: int
    moved_by_the_threshold: int
    trl_note: str  # why TRL can't load the kept rows from one file; empty where it can


def apply_decisions(out: Path) -> Applied:
    """Writes the run's files again, by its scores, the threshold in force and the decisions in force.

    Without decisions the files are those that `filter` wrote. Raises UserError when the input is not what was filtered.
    """
    saved = read_run(out)
    store.check_log(out, saved)
    if saved.review and not store.version(out):
        lost = f"{out / store.FILE}: missing or empty, and run.yaml tells of a review that would be undone"
        raise UserError(f"{lost}; put the file back, or decide again with gradshield review")
    with run_lock(out):
        scores = read_run_scores(out, saved.summary.rows)
        source = source_of_run(saved, out)
        if not source.folder:  # the name may have been another's, a link's, when the run was made
            source = replace(source, names=(scores.place[0].rpartition(":")[0],))
        decisions = store.decisions_in_force(out)
        judged = judge(scores, threshold_in_force(saved, decisions), decisions)
        verdicts = [VERDICTS[code] for code in judged.verdict]
        reasons = {int(n): scores.reasons[scores.reason[n]] for n in np.flatnonzero(scores.reason >= 0)}
        counts = write_outputs(source, verdicts, reasons, out)
        with catch_write_errors(out):
            _write_verdicts(out, verdicts)
            forms = (trl_form(row.record or {}) for row in read_rows(source))
            note = note_of_kept(saved.settings, forms, verdicts)
            review = _review(saved, scores, judged, decisions, counts, note)
            content = {part: value for part, value in saved.as_dict().items() if part != "review"}
            if decisions:
                content["review"] = review.as_dict()
            report_run(out, SavedRun(**content), source)
            write_run(out, content)
    moved = len(review.moved), review.moved_by_the_threshold
    return Applied(review.kept, review.quarantined, review.set_aside, *moved, note)


def _review(
    saved: SavedRun,
    scores: RunScores,
    judged: Judged,
    decisions: Mapping[int, Decision],
    counts: Mapping[str, int],
    note: str,
) -> ReviewSummary:
    """What run.yaml says of the review: with the scores, enough to tell why each row is where it is."""
    own = judge(scores, own_threshold(saved), {}).verdict
    moved = [row for row in decisions if row and judged.verdict[row - 1] != judged.by_score[row - 1]]
    by = {"who": decisions[0].who, "when": decisions[0].at} if 0 in decisions else {}
    return ReviewSummary(
        threshold=ReviewedThreshold(value=judged.threshold, **by),
        kept=counts["kept"],
        quarantined=counts["quarantined"],
        set_aside=counts["set aside"],
        decided=int(judged.decided.sum()),
        moved_by_the_threshold=int((judged.by_score != own).sum()),
        moved=[
            MovedRow(row=row, to=d.verdict, who=d.who, when=d.at, **({"note": d.note} if d.note else {}))
            for row, d in ((row, decisions[row]) for row in moved)
        ],
        **({"trl_note": note} if note else {}),
    )


def _write_verdicts(out: Path, verdicts: list[str]) -> None:
    """scores.parquet with these verdicts, whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = read_table(out)
    place = table.column_names.index("verdict")
    with write_whole(out / "scores.parquet") as stream:
        pq.write_table(table.set_column(place, "verdict", pa.array(verdicts, pa.string())), stream)
