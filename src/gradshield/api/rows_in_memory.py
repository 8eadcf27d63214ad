"""The caller's rows → a path that the commands can read.

Rows in memory are written to rows.jsonl in the run folder, so that the run can be resumed, reviewed and explained
later.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gradshield.base.errors import UserError
from gradshield.base.storage import write_whole
from gradshield.data.run_folder import ROWS, catch_write_errors, refuse_other_files

Rows = str | os.PathLike[str] | Iterable[Mapping[str, Any]]
"""A file, folder or Hub dataset id; or rows in memory: a `datasets.Dataset`, a pandas DataFrame, a list of dicts."""


def path_of(rows: Rows, out: Path, mark: str = "run.yaml") -> str:
    """The path of `rows`. Rows in memory are written to `out` first.

    `mark` is the file that tells a run's folder. Raises UserError for rows that are not dicts or can't be written as
    JSON, and if `out` holds other rows or other files.
    """
    if isinstance(rows, str | os.PathLike):
        return os.fspath(rows)
    with catch_write_errors(out):
        refuse_other_files(out, mark)
        out.mkdir(parents=True, exist_ok=True)
        before = out / ROWS
        known = hashlib.sha256(before.read_bytes()).hexdigest() if before.exists() else None
        if known is None:
            with write_whole(before) as stream:
                for line in _lines(rows):
                    stream.write(line)
                if not stream.tell():
                    raise UserError("rows: there are none; give at least one row")
            return str(before)
    digest = hashlib.sha256()
    for line in _lines(rows):
        digest.update(line)
    if digest.hexdigest() != known:
        raise UserError(f"{out}: holds a run of other rows; choose another `out`, or delete it")
    return str(before)


def _lines(rows: Any) -> Iterator[bytes]:
    """Each row as a line of JSON."""
    pandas = sys.modules.get("pandas")
    if pandas and isinstance(rows, pandas.DataFrame):
        if not rows.columns.is_unique:
            twice = rows.columns[rows.columns.duplicated()][0]
            raise UserError(f"rows: column {twice!r} appears twice; rename one of them")
        rows = rows.astype(object).where(rows.notna(), None).to_dict("records")  # a missing value is null
    if isinstance(rows, Mapping):
        raise UserError("rows is a mapping; give one of its values, such as dataset['train']")
    if not isinstance(rows, Iterable):
        raise UserError(
            f"rows: {type(rows).__name__} is not accepted; give a path, a Dataset, a DataFrame or a list of dicts"
        )
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise UserError(f"rows[{number}] is a {type(row).__name__}; each row must be a dict")
        try:
            text = json.dumps(dict(row), default=_plain, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise UserError(f"rows[{number}] can't be written as JSON ({error})") from None
        try:
            yield f"{text}\n".encode()
        except UnicodeEncodeError:  # half a surrogate pair, which is set aside with that as its reason
            yield f"{json.dumps(dict(row), default=_plain)}\n".encode()


def _plain(value: Any) -> Any:
    """A date or an array of numbers in its JSON form."""
    for method in ("isoformat", "tolist"):
        if hasattr(value, method):
            return getattr(value, method)()
    raise TypeError(f"{type(value).__name__} is not JSON")
