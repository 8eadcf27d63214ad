"""A run's folder → its report.html: when `filter` is done, and again when a person moved rows.

What only the model could tell, the anchors' scores and the tokens of the highest rows, `filter` leaves in report.json.
"""

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NotRequired

import numpy as np
from typing_extensions import TypedDict

from gradshield.base.storage import read_json, write_text
from gradshield.data import Conversation, Source, read_rows, to_conversation
from gradshield.data.run_folder import COLUMNS, SavedRun, catch_write_errors, read_table, shared_texts
from gradshield.report.filter_page import ReportRow, write_report
from gradshield.report.words import command_again, next_steps
from gradshield.threshold import Threshold

FILE = "report.json"
SHOWN = 20  # rows of each list


class _Kept(TypedDict):
    unit: NotRequired[str]
    anchors: dict[str, list[float]]
    tokens: dict[str, list[tuple[str, float]]]


def keep_for_report(
    out: Path, anchors: Mapping[str, np.ndarray], tokens: Mapping[int, tuple[tuple[str, float], ...]], unit: str = ""
) -> None:
    """Leaves the anchors' scores by kind, each response token of some rows (by index) with its share of FIHS, and the
    unit of the scores."""
    content = {"anchors": {kind: values.tolist() for kind, values in anchors.items()}, "tokens": tokens, "unit": unit}
    with catch_write_errors(out):
        write_text(out / FILE, json.dumps(content))


def report_run(out: Path, saved: SavedRun, source: Source) -> None:
    """Writes report.html from scores.parquet, report.json, the rows of `source` and `saved`, run.yaml's content.

    Where `saved` tells of a review, its threshold and counts are shown. Raises UserError where it can't be written.
    """
    table = read_table(out, without=("row", "place", "reason", "tokens"), coded=("verdict", "group"))
    scores = table["score"].to_numpy().astype(np.float64)
    verdicts, groups = shared_texts(table["verdict"]), shared_texts(table["group"])
    signals = {name: table[name].to_numpy() for name in table.column_names if name not in COLUMNS}
    del table  # with millions of rows, its texts take as much again
    kept = _kept(out)
    threshold = _threshold(saved)
    called = Path(out.resolve().name)
    high, near = highest_rows(scores), _nearest(scores, threshold.value)
    wanted = {*high, *near}
    shown = {row.index: row for row in read_rows(source) if row.index in wanted}
    layout, columns = saved.input.layout, saved.settings["columns"]
    trainer = saved.settings.get("trainer", "trl")
    moved = {m.row: ": ".join(filter(None, (m.who, m.note))) for m in (saved.review.moved if saved.review else ())}

    def entry(n: int) -> ReportRow:
        row = shown[n]
        said = _turns(to_conversation(row.record or {}, layout, columns, trainer))
        tokens = tuple(kept["tokens"].get(str(n), ()))
        also = {name: float(values[n]) for name, values in signals.items()}
        place = (n + 1, row.source, row.line, float(scores[n]), verdicts[n])
        group = groups[n] if groups[n] != row.source else ""
        return ReportRow(*place, said, also, tokens, moved.get(n + 1, ""), group)

    aside: dict[str, list[str]] = defaultdict(list)
    unscored = read_table(out, ["place", "reason"], verdict="set aside")
    for place, reason in zip(unscored["place"].to_pylist(), unscored["reason"].to_pylist()):
        aside[reason].append(place)
    write_report(
        out / "report.html",
        summary=_summary(saved),
        scores=scores,
        verdicts=verdicts,
        sources=groups,
        threshold=threshold,
        anchors=anchor_scores(out),
        highest=[entry(n) for n in high],
        borderline=[entry(n) for n in near],
        set_aside=aside,
        settings=saved.plan(),
        axis=axis_title(out, saved.summary.scorer),
        unit=kept.get("unit", ""),
        next_steps=next_steps(out, high[0] + 1 if high else None, called),
        again=command_again(saved.input.path, called),
    )


def axis_title(out: Path, scorer: str) -> str:
    """What the axis of a run's scores is called: the scorer and, where it has one, its unit."""
    unit = _kept(out).get("unit")
    return f"score by {scorer.partition(':')[0]}{f', {unit}' if unit else ''} (higher: more harmful)"


def anchor_scores(out: Path) -> dict[str, np.ndarray]:
    """The anchors' scores by kind, as saved by `filter`."""
    return {kind: np.array(values, dtype=float) for kind, values in _kept(out)["anchors"].items()}


def _kept(out: Path) -> _Kept:
    return read_json(out / FILE, _Kept) if (out / FILE).exists() else {"anchors": {}, "tokens": {}}


def highest_rows(scores: np.ndarray) -> list[int]:
    """Indices of the rows with the highest scores, highest first; rows without a score are none of them."""
    return _highest(np.where(np.isfinite(scores), scores, -np.inf)).tolist()


def _nearest(scores: np.ndarray, threshold: float) -> list[int]:
    """Indices of the rows nearest to the threshold, the highest first; nearest to none are the highest of all."""
    if not np.isfinite(threshold):
        return highest_rows(scores)
    near = _highest(np.where(np.isfinite(scores), -np.abs(scores - threshold), -np.inf))
    return near[np.argsort(-scores[near], kind="stable")].tolist()


def _highest(values: np.ndarray) -> np.ndarray:
    """Indices of the highest SHOWN finite values, highest first; of equal ones the first. Sorts no more than these: of
    millions it would take their memory four times."""
    last = max(len(values) - SHOWN, 0)
    least = np.partition(values, last)[last] if len(values) else 0.0
    high = np.flatnonzero((values >= least) & np.isfinite(values))
    return high[np.argsort(-values[high], kind="stable")][:SHOWN]


def _threshold(saved: SavedRun) -> Threshold:
    """The run's threshold, or the one that a person set in its place."""
    own = saved.summary.threshold
    moved = saved.review and saved.review.threshold
    if moved and moved.who and moved.value != own.value:
        note = f"set by {moved.who} on {moved.when[:10]}; the run's own is {own.limit:+.3f} ({own.note})"
        return Threshold(moved.limit, "by hand", note)
    return Threshold(own.limit, own.rule, own.note, own.clear, own.good_lost, own.harmful_kept)


def _summary(saved: SavedRun) -> dict[str, Any]:
    """The run's summary, with what a review made of it."""
    summary, review = saved.summary.as_dict(), saved.review
    if not review:
        return summary
    summary.pop("trl_note", None)  # it was of other rows
    note = {"trl_note": review.trl_note} if review.trl_note else {}
    counts = {"kept": review.kept, "quarantined": review.quarantined, "set_aside": review.set_aside}
    moved = {"moved_by_a_person": len(review.moved), "moved_by_the_threshold": review.moved_by_the_threshold}
    return {**summary, **counts, **moved, **note}


def _turns(conversation: Conversation | str) -> tuple[tuple[str, str], ...]:
    if isinstance(conversation, str):
        return (("row", conversation),)
    if conversation.text is not None:
        return (("text", conversation.text),)
    return tuple((m.role, m.content) for m in conversation.messages)
