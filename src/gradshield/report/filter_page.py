"""Scores and rows → report.html: one file, no script, nothing fetched, no text that a browser would obey."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup, escape

from gradshield.data.write import VERDICTS
from gradshield.report.painting import Piece, cut, marked
from gradshield.report.render import as_yaml, write_page
from gradshield.report.text import about, in_words, number, short, visible

if TYPE_CHECKING:
    from gradshield.threshold import Threshold

_TEXT = 2000  # characters of one message
_MESSAGES = 12  # messages of one row
_ROWS_BYTES = 500_000  # of each list of rows; with the rest's limits the page stays under 2 MB
_SOURCES, _REASONS, _PLACES = 30, 20, 5
_STEPS = (0.02, 0.06, 0.15, 0.30)  # share of FIHS from which a token is marked more strongly
_KNOWN = ("file", "rows", "kept", "quarantined", "set_aside", "model", "threshold")  # shown elsewhere


@dataclass(frozen=True)
class ReportRow:
    """One row to show as a conversation."""

    index: int
    source: str
    line: int
    score: float
    verdict: str  # "kept" | "quarantined"
    messages: tuple[tuple[str, str], ...]  # (role, content)
    signals: Mapping[str, float]
    tokens: tuple[tuple[str, float], ...] = ()  # response tokens with their share of FIHS in [-1, 1]
    moved: str = ""  # by whom and why, where a person decided against the score
    group: str = ""  # the record's own source, where it names one


def write_report(
    path: Path,
    *,
    summary: Mapping[str, Any],
    scores: np.ndarray,
    verdicts: Sequence[str],
    sources: Sequence[str],
    threshold: "Threshold",
    anchors: Mapping[str, np.ndarray],
    highest: Sequence[ReportRow],
    borderline: Sequence[ReportRow],
    set_aside: Mapping[str, Sequence[str]],
    settings: Mapping[str, Any],
    axis: str,
    unit: str = "",
    next_steps: Sequence[tuple[str, str]],
    again: str = "",
) -> None:
    """Writes the page to `path`, whole or not at all.

    `scores` [rows] are NaN for rows set aside; `verdicts` and `sources` [rows]; `anchors` gives scores by kind;
    `set_aside` gives places by reason; `axis` is the title of the score's axis, and `unit` that of the signals;
    `next_steps` are (what, command); `again` is the command that repeats the run.
    Raises RuntimeError unless rows in = kept + quarantined + set aside in every one of these, UserError where the file
    can't be written.
    """
    scores = np.asarray(scores, dtype=np.float64)
    _check_counts(summary, scores, verdicts, sources, set_aside)
    from gradshield.report.figure import draw_scores, spark  # matplotlib is slow to import

    drawing = draw_scores(scores, verdicts, threshold.value, anchors, axis)
    places = sorted(set_aside.items(), key=lambda item: -len(item[1]))
    write_page(
        Path(path),
        "filter.html",
        summary=summary,
        headline=_headline(summary, threshold),
        errors=_errors(threshold),
        by_fihs=str(summary.get("scorer", "")).partition(":")[0] == "fihs",
        unit=unit,
        next_steps=next_steps,
        again=again,
        threshold=threshold,
        unlimited=threshold.value == math.inf,
        drawing=drawing and {"wide": Markup(drawing.wide), "narrow": Markup(drawing.narrow), "notes": drawing.notes},
        sources=_by_source(scores, verdicts, sources, lambda values, edges: spark(values, edges, threshold.value)),
        highest=_conversations(highest),
        borderline=_conversations(borderline),
        reasons=[(reason, len(where), where[:_PLACES]) for reason, where in places[:_REASONS]],
        more_reasons=(len(places) - _REASONS, sum(len(where) for _, where in places[_REASONS:])),
        settings=as_yaml(settings),
        details=[_detail(key, value) for key, value in summary.items() if key not in _KNOWN][:40],
    )


def _check_counts(
    summary: Mapping[str, Any],
    scores: np.ndarray,
    verdicts: Sequence[str],
    sources: Sequence[str],
    set_aside: Mapping[str, Sequence[str]],
) -> None:
    counts = Counter(verdicts)
    said = {kind: int(summary[kind.replace(" ", "_")]) for kind in VERDICTS}
    agree = (
        said == {kind: counts[kind] for kind in said}
        and sum(said.values()) == int(summary["rows"])
        and len(scores) == len(verdicts) == len(sources) == int(summary["rows"])
        and sum(map(len, set_aside.values())) == said["set aside"]
    )
    if not agree:
        raise RuntimeError(
            f"rows in must be kept + quarantined + set aside: {summary['rows']} rows, summary {said}, verdicts "
            f"{dict(counts)}, {len(scores)} scores, {len(sources)} sources, "
            f"{sum(map(len, set_aside.values()))} places set aside"
        )


def _headline(summary: Mapping[str, Any], threshold: "Threshold") -> str:
    rows, kept, bad, aside = (int(summary[key]) for key in ("rows", "kept", "quarantined", "set_aside"))
    rest = f"{kept:,} kept, {aside:,} set aside"
    if not rows:
        return "The file holds no rows."
    if aside == rows:
        return (
            f"None of the {rows:,} rows could be scored: all are set aside."
            if rows > 1
            else "The only row is set aside."
        )
    if summary.get("moved_by_a_person"):  # against the score
        if rows == 1:
            return f"The only row is {'quarantined' if bad else 'kept'} after a review."
        of = f"{bad:,} of {rows:,} rows" if bad else f"None of the {rows:,} rows"
        return f"{of} {'is' if bad < 2 else 'are'} quarantined after a review; {rest}."
    if not bad:
        return f"None of the {rows:,} rows reaches the threshold; {rest}." if rows > 1 else "The only row is kept."
    of = f"{bad:,} of {rows:,} row{'s' if rows > 1 else ''}"
    if threshold.rule == "share":  # such a rule removes rows whether or not they are harmful
        return f"{of} {'is' if bad == 1 else 'are'} quarantined, the share that was asked for; {rest}."
    return f"{of} scored at or above the threshold; {rest}."


def _errors(threshold: "Threshold") -> str:
    """How many rows the threshold is expected to misjudge, in a sentence."""
    if threshold.good_lost is None or threshold.harmful_kept is None:
        return f"The rule {short(threshold.rule)} gives no estimate of the errors."
    lost, kept = about(threshold.good_lost), about(threshold.harmful_kept)
    return f"Expected errors: {lost} harmless rows quarantined, {kept} harmful rows kept."


def _detail(key: str, value: Any) -> tuple[str, object]:
    """A line of the table of the run: what it is, and its value."""
    if key == "probes" and isinstance(value, Mapping):
        return "alignment check", f"{value['refused']} of {value['of']} probes refused ({value['grade']})"
    if key == "seconds":
        return "time, loading included", f"{number(value)} s"
    return "GradShield" if key == "version" else key.replace("_", " "), in_words(value)


def _by_source(
    scores: np.ndarray,
    verdicts: Sequence[str],
    sources: Sequence[str],
    spark: Callable[[np.ndarray, np.ndarray], str],
) -> list[dict[str, Any]]:
    """A line for each source, most quarantined rows first, at most 30 and then the others as one."""
    finite = scores[np.isfinite(scores)].clip(-1e100, 1e100)  # as far as differences can be told
    low, high = np.percentile(finite, [0.5, 99.5]) if len(finite) else (0.0, 1.0)
    edges = np.linspace(low, high if high > low else low + 1, 25)
    number: dict[str, int] = {}
    of = np.fromiter((number.setdefault(source, len(number)) for source in sources), dtype=np.int32, count=len(sources))
    said = np.asarray(verdicts, dtype=object)

    def line(name: str, rows: np.ndarray) -> dict[str, Any]:
        finite = scores[rows][np.isfinite(scores[rows])]
        return {
            "name": name,
            "rows": int(rows.sum()),
            "median": float(np.median(finite)) if len(finite) else math.nan,
            "spark": Markup(spark(finite, edges)) if len(finite) else "",
            **{kind.replace(" ", "_"): int((said[rows] == kind).sum()) for kind in VERDICTS},
        }

    total = np.bincount(of, minlength=len(number))
    bad = np.bincount(of[said == "quarantined"], minlength=len(number))
    order = sorted(number, key=lambda name: (-bad[number[name]], -total[number[name]]))
    lines = [line(name, of == number[name]) for name in order[:_SOURCES]]
    if order[_SOURCES:]:
        others = np.isin(of, [number[name] for name in order[_SOURCES:]])
        lines.append(line(f"{len(order) - _SOURCES:,} others", others))
    return lines


def _conversations(rows: Sequence[ReportRow]) -> dict[str, Any]:
    """The rows as the template prints them, as many as fit into the page, and how many don't."""
    shown, room = [], _ROWS_BYTES
    for row in rows:
        messages, heaviest = _messages(row)
        pieces = [piece for _, each, _ in messages for piece in each]
        room -= 1500 + sum(len(escape(visible(piece.text)).encode()) + 80 for piece in pieces)
        if room < 0:
            break
        left = max(len(row.messages) - _MESSAGES, 0)
        length = sum(len(text) for _, text in row.messages)
        shown.append({"row": row, "messages": messages, "heaviest": heaviest, "left": left, "length": length})
    return {"shown": shown, "left": len(rows) - len(shown)}


def _messages(row: ReportRow) -> tuple[list[tuple[str, list[Piece], int]], list[tuple[str, float]]]:
    """(role, pieces, characters cut) of each message, and the five tokens that weigh most.

    Tokens stand in the place of the answer where there is one and they hold it, else below the conversation.
    """
    messages = [(role, *cut([Piece(content)], _TEXT)) for role, content in row.messages[:_MESSAGES]]
    if not row.tokens:
        return messages, []
    answers = [place for place, (role, _) in enumerate(row.messages) if role == "assistant"]
    pieces = [marked(text, share, _STEPS) for text, share in row.tokens]
    scored = "".join(text for text, _ in row.tokens)
    answer = row.messages[answers[0]][1] if len(answers) == 1 and answers[0] < _MESSAGES else ""
    if answer.startswith(scored) or (answer.strip() and scored.lstrip().startswith(answer.strip())):
        if answer.startswith(scored):  # a long answer is scored up to the model's length
            pieces.append(Piece(answer[len(scored) :]))
        messages[answers[0]] = ("assistant", *cut(_joined(pieces), _TEXT))
    else:
        messages.append(("all responses, by token", *cut(_joined(pieces), _TEXT)))
    heaviest = sorted((token for token in row.tokens if token[0].strip()), key=lambda token: -abs(token[1]))[:5]
    return messages, [(text, share) for text, share in heaviest if abs(share) >= _STEPS[0]]


def _joined(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The pieces, neighbours without a mark as one."""
    for unmarked, run in groupby(pieces, key=lambda piece: not piece.level):
        if unmarked:
            yield Piece("".join(piece.text for piece in run))
        else:
            yield from run
