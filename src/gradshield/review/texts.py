"""The texts of a run's rows in one SQLite file beside the scores, so that any row is a look-up and a search one scan.

The file follows from the input alone and may be deleted; explanations that were computed are kept in it, too.
"""

import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from gradshield.base.errors import UserError
from gradshield.base.progress import progress
from gradshield.base.storage import replace_when_done
from gradshield.data import Conversation, Row, to_conversation
from gradshield.data.run_folder import SavedRun, catch_write_errors, rows_of_run, run_lock
from gradshield.screen.explanation import Explanation

FILE = "review-texts.sqlite"
OPENING = 240  # characters of a request and of its answer that the table shows
_FORMAT = "2"
_EXPLANATION = TypeAdapter(Explanation)
_SCHEMA = """
CREATE TABLE about (input TEXT, format TEXT);
CREATE TABLE texts (
  row INTEGER PRIMARY KEY, place TEXT, request TEXT, answer TEXT, length INTEGER,
  record TEXT, problem TEXT, folded TEXT
);
CREATE TABLE explanations (row INTEGER, key TEXT, json TEXT, PRIMARY KEY (row, key));
"""


def open_texts(out: Path, saved: SavedRun) -> None:
    """Makes the file of texts unless it is there. Raises UserError when the run's input can't be read again."""
    about = (saved.input.sha256, _FORMAT)
    file = out / FILE
    try:
        with closing(sqlite3.connect(file.absolute().as_uri() + "?mode=ro", uri=True)) as db:
            if db.execute("SELECT * FROM about").fetchone() == about:
                return
    except sqlite3.Error:
        pass  # not there, or not whole: it is made again
    rows = rows_of_run(saved, out)
    with run_lock(out), catch_write_errors(out):
        try:
            with replace_when_done(file) as temporary, closing(sqlite3.connect(temporary)) as db, db:
                db.execute("PRAGMA journal_mode = OFF")  # whole or not at all, by the move
                db.executescript(_SCHEMA)
                db.executemany("INSERT INTO texts VALUES (?, ?, ?, ?, ?, ?, ?, ?)", _lines(rows, saved))
                db.execute("INSERT INTO about VALUES (?, ?)", about)
        except sqlite3.Error as error:
            raise OSError(str(error)) from error


def row_of(out: Path, row: int) -> Row | None:
    """Row number `row` (from 1) as it was read, but for its bytes: `raw` is its JSON, or what could be decoded."""
    with _open(out) as db:
        found = db.execute("SELECT place, record, problem FROM texts WHERE row = ?", (row,)).fetchone()
    if found is None:
        return None
    place, text, problem = found
    source, _, line = place.rpartition(":")
    record = json.loads(text) if problem is None else None
    return Row(row - 1, source, int(line), text.encode("utf-8", "replace"), record, problem)


def openings(out: Path, rows: Sequence[int]) -> dict[int, tuple[str, str, int]]:
    """The opening of the last request and of its answer, and the characters of the whole, by row number."""
    with _open(out) as db:
        marks = ",".join("?" * len(rows))
        query = f"SELECT row, request, answer, length FROM texts WHERE row IN ({marks})"
        return {row: tuple(rest) for row, *rest in db.execute(query, [int(row) for row in rows])}


def search_rows(out: Path, words: str, total: int) -> np.ndarray:
    """bool [total], True at rows whose text or place holds `words`, whatever the case."""
    result = np.zeros(total, dtype=bool)
    with _open(out) as db:
        found = db.execute("SELECT row FROM texts WHERE instr(folded, ?)", (_folded(words),))
        result[[row - 1 for (row,) in found]] = True
    return result


def all_texts(out: Path, limit: int) -> Iterator[str]:
    """The text of every row in order, in lower case and cut to `limit` characters."""
    query = "SELECT substr(folded, instr(folded, char(10)) + 1, ?) FROM texts ORDER BY row"  # behind its place
    with _open(out) as db:
        for (text,) in db.execute(query, (limit,)):
            yield text


def saved_explanation(out: Path, row: int, key: str) -> Explanation | None:
    """What `save_explanation` kept. None where another version kept something else."""
    with _open(out) as db:
        found = db.execute("SELECT json FROM explanations WHERE row = ? AND key = ?", (row, key)).fetchone()
    try:
        return _EXPLANATION.validate_python(json.loads(found[0])) if found else None
    except ValidationError:
        return None


def save_explanation(out: Path, row: int, key: str, explanation: Explanation) -> None:
    """Keeps a row's explanation under a key that says by what it was computed."""
    with _open(out) as db:
        db.execute("INSERT OR REPLACE INTO explanations VALUES (?, ?, ?)", (row, key, json.dumps(asdict(explanation))))


def shown_turns(conversation: Conversation | str) -> list[tuple[str, str]]:
    """(role, text) of every turn; what else a turn holds, such as tool calls, is a turn of its own, as JSON."""
    if isinstance(conversation, str):
        return []
    if conversation.text is not None:
        return [("text", conversation.text)]
    around = (("tools", conversation.tools), ("chat_template_kwargs", conversation.variables))
    shown = [(name, _json(value)) for name, value in around if value]
    for message in conversation.messages:
        if message.content or not message.extra:
            shown.append((message.role, message.content))
        if message.extra:
            shown.append((f"{message.role}, more", _json(message.extra)))
    return shown


def _json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, default=str, indent=1)
    except RecursionError:  # it could be read, but what writes it with line breaks does not go as deep
        return "nested too deeply to be shown"


def _lines(rows: Iterator[Row], saved: SavedRun) -> Iterator[tuple]:
    """A line of the table for each row, with a progress line, as this may take a while."""
    layout, settings, total = saved.input.layout, saved.settings, saved.summary.rows
    columns, trainer = settings["columns"], settings.get("trainer", "trl")
    with progress("reading the rows", 0, total) as advance:
        for row in rows:
            place = f"{row.source}:{row.line}"
            said = shown_turns(to_conversation(row.record, layout, columns, trainer)) if row.record is not None else []
            record = (
                json.dumps(row.record, ensure_ascii=False, default=str)
                if row.problem is None
                else row.raw.decode("utf-8", "replace")
            )
            whole = "\n".join(text for _, text in said) or record
            asked = [text for role, text in said if role in ("user", "text")]
            answered = [text for role, text in said if role == "assistant"]
            yield (
                row.index + 1,
                _plain(place),
                _plain(asked[-1][:OPENING] if asked else whole[:OPENING]),
                _plain(answered[-1][:OPENING] if answered else ""),
                len(whole),
                _plain(record),
                row.problem,
                f"{_folded(place)}\n{_folded(whole)}",
            )
            if row.index % 1000 == 999:
                advance(0, 1000)


def _plain(text: str) -> str:
    """The text without halves of surrogate pairs, which SQLite can't keep."""
    return text.encode("utf-8", "replace").decode()


def _folded(text: str) -> str:
    return _plain(text.casefold()).replace("\0", " ")


@contextmanager
def _open(out: Path) -> Iterator[sqlite3.Connection]:
    try:
        with closing(sqlite3.connect(out / FILE, timeout=30)) as db, db:
            yield db
    except sqlite3.Error as error:
        raise UserError(f"{out / FILE}: can't be used ({error}); delete it and review again") from error
