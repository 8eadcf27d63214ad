"""What people decided, in the run folder's review.sqlite: a log that only grows; the latest entry in force wins.

Undoing is an entry, too, so whatever two tabs, two servers or a kill do at the same moment, nothing is ever lost.
"""

import csv
import io
import json
import math
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from gradshield.base.errors import UserError
from gradshield.report.text import visible

FILE = "review.sqlite"
CHOICES = ("kept", "quarantined", "undecided")
NOTE = 2000  # characters kept of a note
WAIT = 30  # seconds for another process to finish
_THRESHOLD, _UNDO = "threshold", "undo"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS log (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  row INTEGER NOT NULL,    -- from 1; 0 for the threshold
  verdict TEXT NOT NULL,   -- kept, quarantined, undecided; threshold; undo
  value REAL,              -- the threshold, or NULL for the run's own
  note TEXT NOT NULL,
  who TEXT NOT NULL,
  at TEXT NOT NULL,        -- UTC
  undoes INTEGER UNIQUE REFERENCES log (id)
);
CREATE INDEX IF NOT EXISTS log_row ON log (row);
CREATE TRIGGER IF NOT EXISTS log_grows_only BEFORE UPDATE ON log BEGIN SELECT RAISE (ABORT, 'the log only grows'); END;
CREATE TRIGGER IF NOT EXISTS log_keeps_all BEFORE DELETE ON log BEGIN SELECT RAISE (ABORT, 'the log only grows'); END;
"""
_IN_FORCE = "verdict != 'undo' AND id NOT IN (SELECT undoes FROM log WHERE undoes IS NOT NULL)"


@dataclass(frozen=True)
class Decision:
    """One entry of the log."""

    id: int
    row: int  # from 1; 0 for the threshold
    verdict: str  # "kept" | "quarantined" | "undecided"; "threshold"; "undo"
    value: float | None  # the threshold, None for the run's own
    note: str
    who: str
    at: str  # UTC, ISO 8601
    undoes: int | None = None  # the entry that this one takes back


def decide(out: Path, row: int, verdict: str, note: str | None, who: str) -> Decision:
    """Appends a person's verdict on a row (from 1), one of CHOICES, and returns the entry once it is on the disk. None:
    with the note in force."""
    if verdict not in CHOICES:
        raise UserError(f"{verdict}: a decision must be one of {', '.join(CHOICES)}")
    if note is None:
        stands = decisions_in_force(out).get(row)
        note = stands.note if stands else ""
    return _append(out, row, verdict, None, note, who)


def decide_all(out: Path, rows: Sequence[int], verdict: str, who: str, seen: int) -> tuple[Decision, Decision] | None:
    """Appends a person's verdict on each of `rows` (from 1; at least one), all or none, and returns the first and the
    last entry; notes that stand are kept. None where the log has gone on since its version `seen`."""
    notes = {row: decision.note for row, decision in decisions_in_force(out).items()}
    with _open(out) as db:
        db.execute("BEGIN IMMEDIATE")
        if _version(db) != seen:
            return None
        at = datetime.now(UTC).isoformat(timespec="seconds")
        entries = [_insert(db, int(row), verdict, None, notes.get(row, ""), who, None, at) for row in rows]
    return entries[0], entries[-1]


def undo_all(out: Path, first: int, last: int, at: str, who: str) -> int:
    """Takes back those of `decide_all`'s entries `first` … `last`, made at the time `at`, that still stand; returns how
    many those were."""
    with _open(out) as db:
        db.execute("BEGIN IMMEDIATE")
        query = f"SELECT id, row FROM log WHERE {_IN_FORCE} AND id BETWEEN ? AND ? AND at = ?"
        found = db.execute(query, (first, last, at)).fetchall()
        for entry, row in found:
            _insert(db, row, _UNDO, None, "", who, entry)
    return len(found)


def move_threshold(out: Path, value: float | None, who: str) -> Decision:
    """Appends the threshold that a person set; None is the run's own, infinity one that removes nothing."""
    if value is not None and math.isnan(value):
        raise UserError("the threshold must be a number")
    return _append(out, 0, _THRESHOLD, value, "", who)


def undo(out: Path, id: int | None, who: str, made: tuple[int, str] | None = None) -> Decision | None:
    """Takes back entry `id` (None: the latest in force) and returns it; None when there is nothing to take back, or
    when the entry is not on the row and of the time `made`, so that it is one of another log."""
    with _open(out) as db:
        db.execute("BEGIN IMMEDIATE")  # so that nobody else takes it back in between
        which = "id = ?" if id is not None else "? IS NULL ORDER BY id DESC LIMIT 1"
        found = db.execute(f"SELECT * FROM log WHERE {_IN_FORCE} AND {which}", (id,)).fetchone()
        entry = Decision(*found) if found else None
        if entry is None or made not in (None, (entry.row, entry.at)):
            return None
        _insert(db, entry.row, _UNDO, None, "", who, entry.id)
    return entry


def decisions_in_force(out: Path) -> dict[int, Decision]:
    """The decision in force for each row that has one, and the threshold's under 0, by row number.

    Left out are those that say nothing: "undecided", and a threshold that is the run's own.
    """
    query = f"SELECT * FROM log WHERE id IN (SELECT max(id) FROM log WHERE {_IN_FORCE} GROUP BY row) ORDER BY row"
    return {d.row: d for d in _read(out, query) if d.verdict in ("kept", "quarantined") or d.value is not None}


def history(out: Path, row: int) -> list[tuple[Decision, Decision | None]]:
    """Every entry on a row, latest first, each with the one that took it back."""
    entries = _read(out, "SELECT * FROM log WHERE row = ? ORDER BY id DESC", (row,))
    taken = {entry.undoes: entry for entry in entries if entry.undoes}
    return [(entry, taken.get(entry.id)) for entry in entries if entry.verdict != _UNDO]


def version(out: Path) -> int:
    """The number of the latest entry, which grows with every change."""
    if not (out / FILE).exists():
        return 0
    with _open(out) as db:
        return _version(db)


def _version(db: sqlite3.Connection) -> int:
    return db.execute("SELECT coalesce(max(id), 0) FROM log").fetchone()[0]


def export_json(out: Path) -> str:
    """The decisions in force, by row, and the whole log, in ASCII; a threshold that removes nothing is "inf"."""

    def plain(entry: Decision) -> dict:
        return {k: str(v) if v in (math.inf, -math.inf) else v for k, v in asdict(entry).items()}

    log = _read(out, "SELECT * FROM log ORDER BY id")
    both = {"standing": map(plain, decisions_in_force(out).values()), "log": map(plain, log)}
    return json.dumps({name: list(entries) for name, entries in both.items()}, indent=1, allow_nan=False)


def export_csv(out: Path, places: Sequence[str]) -> str:
    """The decisions in force, one per line; no cell is a formula to a spreadsheet. `places` [rows] are file:line."""
    stream = io.StringIO()
    writer = csv.writer(stream)
    writer.writerow(["row", "place", "verdict", "threshold", "note", "who", "when"])
    for row, d in decisions_in_force(out).items():
        value = "" if d.value is None else d.value
        words = [places[row - 1] if row else "", d.verdict], [d.note, d.who, d.at]
        writer.writerow([row, *map(_cell, words[0]), value, *map(_cell, words[1])])
    return stream.getvalue()


def _cell(text: str) -> str:
    """Text that a spreadsheet takes as text: an apostrophe in front of what it would take as a formula."""
    text = visible(text)
    return f"'{text}" if text.lstrip()[:1] in ("=", "+", "-", "@", "|", "%", "＝", "＋", "－", "＠") else text


def _append(out: Path, row: int, verdict: str, value: float | None, note: str, who: str) -> Decision:
    with _open(out) as db:
        return _insert(db, row, verdict, value, note, who, None)


def _insert(
    db: sqlite3.Connection,
    row: int,
    verdict: str,
    value: float | None,
    note: str,
    who: str,
    undoes: int | None,
    at: str = "",
) -> Decision:
    at = at or datetime.now(UTC).isoformat(timespec="seconds")
    note, who = (text.encode("utf-8", "replace").decode()[:NOTE] for text in (note, who))
    fields = (row, verdict, value, note, who, at, undoes)
    query = "INSERT INTO log (row, verdict, value, note, who, at, undoes) VALUES (?, ?, ?, ?, ?, ?, ?)"
    return Decision(db.execute(query, fields).lastrowid or 0, *fields)


def _read(out: Path, query: str, values: tuple = ()) -> list[Decision]:
    if not (out / FILE).exists():
        return []
    with _open(out) as db:
        return [Decision(*fields) for fields in db.execute(query, values)]


@contextmanager
def _open(out: Path) -> Iterator[sqlite3.Connection]:
    """One transaction on the log, on the disk when it ends; any number of threads and processes may do so at once."""
    try:
        with closing(sqlite3.connect(out / FILE, timeout=WAIT)) as db:
            if db.execute("PRAGMA user_version").fetchone()[0] != 1:
                _use_wal(db)
                db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version = 1; COMMIT;")
            db.execute("PRAGMA synchronous = FULL")
            with db:
                yield db
    except sqlite3.Error as error:
        raise UserError(f"{out / FILE}: can't be used ({error}); check the disk, or move the file away") from error


def _use_wal(db: sqlite3.Connection) -> None:
    """Switches to write-ahead logging. SQLite does not wait while another process does the same, so this does."""
    end = time.monotonic() + WAIT
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                raise
            time.sleep(0.02)
