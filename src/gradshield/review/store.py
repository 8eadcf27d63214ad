"""What people decided, in the run folder's review.sqlite: a log that only grows; the latest entry in force wins.

Undoing is an entry, too, so whatever two tabs, two servers or a kill do at the same moment, nothing is ever lost.
"""

import csv
import io
import json
import math
import re
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from gradshield.base.errors import UserError
from gradshield.base.storage import exclusive_lock, read_yaml, replace_when_done
from gradshield.data.run_folder import SavedRun
from gradshield.report.text import visible

FILE = "review.sqlite"
CHOICES = ("kept", "quarantined", "undecided")
NOTE = 2000  # characters kept of a note
WAIT = 30  # seconds for another process to finish
_VERSION = 1  # of the file; one without it is no log
_THRESHOLD, _UNDO = "threshold", "undo"
_SCHEMA = f"""
PRAGMA journal_mode = OFF;  -- no file beside it is left by a kill
BEGIN;
CREATE TABLE about (input TEXT);  -- the sha256 of the run's input, one row; earlier versions have no such table
CREATE TABLE log (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  row INTEGER NOT NULL,    -- from 1; 0 for the threshold
  verdict TEXT NOT NULL,   -- kept, quarantined, undecided; threshold; undo
  value REAL,              -- the threshold, or NULL for the run's own
  note TEXT NOT NULL,
  who TEXT NOT NULL,
  at TEXT NOT NULL,        -- UTC
  undoes INTEGER UNIQUE REFERENCES log (id)
);
CREATE INDEX log_row ON log (row);
CREATE TRIGGER log_grows_only BEFORE UPDATE ON log BEGIN SELECT RAISE (ABORT, 'the log only grows'); END;
CREATE TRIGGER log_keeps_all BEFORE DELETE ON log BEGIN SELECT RAISE (ABORT, 'the log only grows'); END;
PRAGMA user_version = {_VERSION};
COMMIT;
"""
_IN_FORCE = "verdict != 'undo' AND NOT EXISTS (SELECT 1 FROM log AS later WHERE later.undoes = log.id)"


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
    with _open(out) as db:
        stands = None if note is not None else _latest(db, "row = ?", row).get(row)
        return _insert(db, row, verdict, None, stands.note if stands else note or "", who, None)


def decide_all(out: Path, rows: Sequence[int], verdict: str, who: str, seen: int) -> tuple[Decision, Decision] | None:
    """Appends a person's verdict on each of `rows` (from 1; at least one), all or none, and returns the first and the
    last entry; notes that stand are kept. None where the log has gone on since its version `seen`."""
    with _open(out) as db:
        db.execute("BEGIN IMMEDIATE")
        if _version(db) != seen:
            return None
        notes = {row: decision.note for row, decision in _latest(db).items()}
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
    with _open(out) as db:
        return _insert(db, 0, _THRESHOLD, value, "", who, None)


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
    return changed_since(out, 0, {})[1]


def changed_since(out: Path, seen: int, before: dict[int, Decision]) -> tuple[int, dict[int, Decision]]:
    """(the log's version, the decisions in force), given those of its version `seen`; only what came later is read."""
    if not (out / FILE).exists():
        return 0, {}
    with _open(out) as db:
        now = _version(db)
        if now < seen:  # another log is there
            seen, before = 0, {}
        if now == seen:
            return now, before
        later = {row for (row,) in db.execute("SELECT row FROM log WHERE id > ?", (seen,))}
        left = {row: d for row, d in before.items() if row not in later}
        return now, left | _latest(db, "row IN (SELECT row FROM log WHERE id > ?)", seen)


def _latest(db: sqlite3.Connection, which: str = "?", value: int = 1) -> dict[int, Decision]:
    """The decisions in force on the rows that the condition `which` names, in their order."""
    last = f"SELECT max(id) FROM log WHERE {which} AND {_IN_FORCE} GROUP BY row"
    query = f"SELECT * FROM log WHERE id IN ({last}) ORDER BY row"
    found = (Decision(*fields) for fields in db.execute(query, (value,)))
    return {d.row: d for d in found if d.verdict in ("kept", "quarantined") or d.value is not None}


def open_log(out: Path, saved: SavedRun) -> None:
    """Makes the log of the run in the folder unless it is there. Raises UserError as `check_log` does, and where
    nothing could be written to it."""
    with _open(out) as db:
        db.execute(f"PRAGMA user_version = {_VERSION}")  # a write: BEGIN IMMEDIATE passes where none can follow
    check_log(out, saved)


def check_log(out: Path, saved: SavedRun) -> None:
    """Raises UserError where there is a log of decisions on other rows than those of the run in the folder."""
    if not (out / FILE).exists():
        return
    with _open(out) as db:
        known = db.execute("SELECT name FROM sqlite_master WHERE name = 'about'").fetchone()
        (of,) = db.execute("SELECT input FROM about").fetchone() if known else (None,)
        (last,) = db.execute("SELECT coalesce(max(row), 0) FROM log").fetchone()
    what = f"a decision on row {last}" if last > saved.summary.rows else "decisions on another file"
    if last > saved.summary.rows or of not in (None, saved.input.sha256):
        raise UserError(f"{out / FILE}: it holds {what}, so it is another run's; put back this run's, or delete it")


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
    """Text that a spreadsheet takes as text, whatever it reads as the end of a cell: an apostrophe in front of what it
    would take as a formula."""
    return re.sub(r"""(^|(?<=[;,\t\n]))(?=["'\s]*[=+\-@|%＝＋－＠])""", "'", visible(text))


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
    file = out / FILE
    try:
        if not file.exists():
            _create(out)
        with closing(sqlite3.connect(file.absolute().as_uri() + "?mode=rw", uri=True, timeout=WAIT)) as db:
            if db.execute("PRAGMA user_version").fetchone()[0] != _VERSION:
                raise sqlite3.DatabaseError("it is empty or cut off")
            db.execute("PRAGMA synchronous = FULL")
            with db:
                yield db
    except (sqlite3.Error, OSError) as error:
        todo = "check the disk and its permissions, and put back a copy of the file, or move it away to decide again"
        raise UserError(f"{file}: can't be used ({error}); {todo}") from error


def _create(out: Path) -> None:
    """Makes a log without entries, whole or not at all, that names the input of the run in the folder."""
    with exclusive_lock(out, wait=True):
        if (out / FILE).exists():  # another process has just made it
            return
        given = read_yaml(out / "run.yaml")["input"]["sha256"] if (out / "run.yaml").exists() else None
        with replace_when_done(out / FILE) as temporary, closing(sqlite3.connect(temporary)) as db:
            db.executescript(_SCHEMA)
            with db:
                db.execute("INSERT INTO about VALUES (?)", (given,))
            db.execute("PRAGMA journal_mode = WAL")
