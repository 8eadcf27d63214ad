"""Runs made without a model: a file, its scores and a run.yaml, as `filter` would leave them."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gradshield.base.settings import FilterSettings
from gradshield.data import Source, detect_layout, open_source, read_rows, to_conversation, write_outputs
from gradshield.data.run_folder import SavedRun, write_run
from gradshield.report.filter_report import keep_for_report, report_run
from gradshield.review import store
from gradshield.threshold import Threshold


def chat(request: str, answer: str, **more: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]
    return {"messages": turns, **more}


def write_jsonl(file: Path, records: Sequence[Any]) -> Path:
    """One record a line; a text is a line as it stands."""
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    file.write_bytes("".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape"))
    return file


def make_run(
    out: Path, path: Path, scores: Sequence[float], threshold: float = 0.0, model: str = "embedded", **settings: Any
) -> Path:
    """A finished run of the file, folder or dataset at `path`; `scores` are those of the rows that can be read."""
    source = open_source(path)
    layout = detect_layout([row.record for row in read_rows(source) if row.record is not None]) or "messages"
    places, groups, reasons = [], [], {}
    for row in read_rows(source):
        places.append(f"{row.source}:{row.line}")
        groups.append((row.record or {}).get("source") or row.source)
        said = to_conversation(row.record, layout) if row.record is not None else row.problem
        if isinstance(said, str):
            reasons[row.index] = said
    by_row = np.full(len(places), np.nan)
    by_row[[n for n in range(len(places)) if n not in reasons]] = scores
    verdicts = [
        "set aside" if n in reasons else "quarantined" if by_row[n] >= threshold else "kept" for n in range(len(places))
    ]
    counts = write_outputs(source, verdicts, reasons, out)
    table = {
        "row": np.arange(1, len(places) + 1),
        "place": places,
        "group": groups,
        "verdict": verdicts,
        "reason": [reasons.get(n) for n in range(len(places))],
        "score": by_row,
        "topic": by_row,
        "answer": by_row + 1,
        "tokens": np.full(len(places), 9.0),
    }
    pq.write_table(pa.table(table), out / "scores.parquet")
    saved = SavedRun(**_saved(source, path, layout, counts, threshold, model, settings))
    keep_for_report(out, {"good": np.array([-2.0, -1.0]), "harmful": np.array([1.0])}, {})
    report_run(out, saved, source)
    write_run(out, saved.as_dict())
    return out


def _saved(
    source: Source, path: Path, layout: str, counts: dict[str, int], threshold: float, model: str, settings: Any
) -> dict[str, Any]:
    value = threshold if np.isfinite(threshold) else None
    return {
        "input": {"path": str(path), "format": source.format, "layout": layout, "sha256": source.sha256},
        "model": {"name": model, "fingerprint": "0" * 16},
        "settings": FilterSettings(model=model, **settings).model_dump(mode="json"),
        "versions": {"gradshield": "0.1.0"},
        "summary": {
            "file": str(path),
            "rows": sum(counts.values()),
            **{name.replace(" ", "_"): count for name, count in counts.items()},
            "model": model,
            "scorer": "intent",
            "threshold": vars(Threshold(0.0, "fixed", "")) | {"value": value},
            "probes": {"refused": 9, "of": 10, "grade": "aligned"},
            **{"seconds": 1.0, "rows_per_second": 2.0, "tokens_per_second": 18, "version": "0.1.0"},
        },
    }


def decided(run: Path) -> dict[int, str]:
    """The verdicts that were decided and stand, by row."""
    return {row: decision.verdict for row, decision in store.decisions_in_force(run).items()}


def digests(out: Path) -> dict[str, str]:
    """Of every file that `filter` writes."""
    found = [p for p in out.rglob("*") if p.is_file() and not p.name.startswith("review")]
    return {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


def verdicts(out: Path) -> list[str]:
    return pq.read_table(out / "scores.parquet")["verdict"].to_pylist()
