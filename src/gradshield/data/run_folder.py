"""The run folder. run.yaml describes the run and, at its end, its result; this decides whether a run can resume."""

import hashlib
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field, ValidationError

from gradshield.base.errors import UserError, one_line
from gradshield.base.storage import (
    LOCK,
    exclusive_lock,
    read_lines,
    read_yaml,
    refuse_links,
    remove_leftovers,
    write_yaml,
)
from gradshield.data import Row, Source, open_source, read_rows
from gradshield.data.formats import LAYOUTS
from gradshield.data.rows import expanded
from gradshield.data.summaries import (
    FilterSummary,
    ModelIdentity,
    ReviewSummary,
    S,
    Saved,
    TuneSummary,
    read_summary,
)
from gradshield.data.trainers import RULES
from gradshield.data.write import VERDICTS

if TYPE_CHECKING:
    from pyarrow import ChunkedArray, Table

    from gradshield.models.load import Model

COLUMNS = ("row", "place", "group", "verdict", "reason", "score", "tokens")  # of scores.parquet; the rest are signals
JOURNAL = "scores.partial"  # finished batches, while a run is under way
TRIALS = "trials.jsonl"  # finished trials of tune
ROWS = "rows.jsonl"  # the rows, where they were given in memory


class InputIdentity(Saved):
    """The file that was read, and how."""

    path: str
    format: str
    layout: str
    sha256: str


class RunPlan(Saved):
    """Everything that identifies a run: resolved settings, the file's and the model's identity, versions."""

    input: InputIdentity
    model: ModelIdentity
    settings: dict[str, Any]  # as JSON has them; another version's may have other names
    versions: dict[str, str]
    scorer: dict[str, Any] = Field(default_factory=dict)  # of filter: its name, version and options
    finetune: dict[str, Any] = Field(default_factory=dict)  # of tune, as the next two
    tune: dict[str, Any] = Field(default_factory=dict)
    evaluation: dict[str, Any] = Field(default_factory=dict)
    file: dict[str, str] = Field(default_factory=dict)  # checksums of the files that the settings name


class SavedRun(RunPlan):
    """The run.yaml of a finished run of filter."""

    summary: FilterSummary
    review: ReviewSummary | None = None

    def plan(self) -> dict[str, Any]:
        """The part of run.yaml that the report shows: all but the summary."""
        return {name: value for name, value in self.as_dict().items() if name != "summary"}


def plan_of(
    source: Source, model: "Model", layout: str, settings: Mapping[str, Any], files: str | None = None, **more: Any
) -> RunPlan:
    """The plan of a run of these rows with this model. `more` are the plan's other fields.

    `files` is `disk_fingerprint`'s, by which `finished_run` knows the model without loading it.
    """
    local = source.path != "-" and expanded(source.path).exists()  # else the id of a Hub dataset
    return RunPlan(
        input=InputIdentity(
            path=str(expanded(source.path).resolve()) if local else source.path,
            format=source.format,
            layout=layout,
            sha256=source.sha256,
        ),
        model=ModelIdentity(name=model.name, fingerprint=model.fingerprint, files=files),
        settings=dict(settings),
        versions=versions(),
        **more,
    )


def versions() -> dict[str, str]:
    """The versions of the libraries that affect how rows are read and scored."""
    return {name: version(name) for name in ("gradshield", "torch", "transformers", "trl")}


def checksums(*names: str | None) -> dict[str, str]:
    """sha256 (16 hex digits) of each name that is a file; these must not change between calls."""
    files = {name: expanded(name) for name in names if name}
    return {name: hashlib.sha256(p.read_bytes()).hexdigest()[:16] for name, p in files.items() if p.is_file()}


def finished_run(out: Path, path: str, asked: Mapping[str, Any], files: str | None, kind: type[S]) -> S | None:
    """The summary, of this `kind`, of the run in `out` if it is finished and checksums show that nothing has changed.

    `asked` is the plan but for the input and the model, whose `files` are `disk_fingerprint`'s. Returns None if
    `find_run` has to look more closely. Raises UserError where the folder is damaged, or the input can't be read.
    """
    place = expanded(path)
    if files is None or not (out / "run.yaml").is_file() or not os.path.exists(place):
        return None  # a pipe can be read only once
    refuse_links(out)
    saved = read_yaml(out / "run.yaml")
    summary, model, given = (saved.get(part) for part in ("summary", "model", "input"))
    if not (isinstance(summary, dict) and isinstance(model, dict) and isinstance(given, dict)):
        return None
    wanted = {**asked, "versions": versions()}
    if model.get("files") != files or any(saved.get(part) != value for part, value in wanted.items()):
        return None
    source = open_source(path, asked["settings"]["format"], asked["settings"]["split"], out)
    same = (source.format, source.sha256) == (given.get("format"), given.get("sha256"))
    known = {*wanted, "summary", "review", "model", "input", "scorer"}  # the scorer follows from settings and versions
    if not same or saved.keys() - known:
        return None
    return _finished(out, kind, summary, given.get("path"))


def find_run(out: Path, plan: RunPlan, kind: type[S], free: Collection[str] = ()) -> S | None:
    """The summary, of this `kind`, of the plan's run if it is finished in `out`; None if it is to start or resume.

    The same rows may come from another path. Settings in `free` may differ while the run is not finished. Raises
    UserError when the folder is another run's, or no run's.
    """
    file = out / "run.yaml"
    with catch_write_errors(out):  # a folder that can't be looked into can't be written to either
        exists = file.exists()
        above = next(p for p in (out, *out.absolute().parents) if p.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):  # else the user would learn it only after long work
            raise UserError(f"{out}: {above} is not a writable folder; choose another -o")
        refuse_other_files(out)
        refuse_links(out)
    if not exists:
        return None
    saved = read_yaml(file)
    planned = plan.as_dict()
    other = saved.keys() ^ planned.keys()
    if other - {"summary", "review"}:
        raise UserError(f"{out}: a run of another command ({', '.join(sorted(other))}); choose another -o")
    for part, wanted in planned.items():
        for key, value in wanted.items():
            there = dict(saved[part]).get(key) if isinstance(saved.get(part), dict) else None
            may = (part, key) in (("input", "path"), ("model", "files")) or (key in free and "summary" not in saved)
            if there != value and not may:
                what = f"{part} ({key}: {there}, now {value})"
                raise UserError(f"{out}: created with different {what}; choose another -o")
    summary = saved.get("summary")
    if summary is None:
        return None
    return _finished(out, kind, summary, planned["input"]["path"])


def _finished(out: Path, kind: type[S], found: Any, path: str | None) -> S:
    """The summary of a finished run. Raises UserError where it is damaged, or where a file that `filter` wrote, or
    the model that `tune` accepted, is missing."""
    remove_leftovers(out, JOURNAL)
    summary = read_summary(kind, found, out / "run.yaml", "summary")
    if kind is FilterSummary:
        files = {f"the file of {name} rows": rows_file(out, name) for name in ("kept", "quarantined")}
        files |= {name: out / name for name in ("scores.parquet", "set_aside.jsonl", "report.html")}
        for name, file in files.items():
            if file is None or not file.exists():
                rebuilt = name != "scores.parquet" and path != "-"
                todo = f"gradshield apply {out} writes it again" if rebuilt else f"delete {out} and filter again"
                raise UserError(f"{out}: {name} is missing, though the run is finished; {todo}")
    if isinstance(summary, TuneSummary) and summary.accepted is not None and not (out / "model").exists():
        trained = out / "trials" / f"{summary.accepted:02d}" / "model"
        todo = f"copy {trained} to {out / 'model'}" if trained.exists() else f"delete {out} and run tune again"
        raise UserError(f"{out}: the accepted model is missing ({out / 'model'}), though the run is finished; {todo}")
    return summary


def refuse_other_files(out: Path, mark: str = "run.yaml") -> None:
    """Raises UserError for a folder that is not empty and lacks the file `mark`, which every run of this kind has."""
    own = (".run.yaml", ROWS, f".{ROWS}", LOCK)  # left by a kill at the start
    if (out / mark).exists() or not out.exists():
        return
    if not out.is_dir() or any(path.name not in own for path in out.iterdir()):
        raise UserError(f"{out}: not empty and not a run; choose another folder with -o")


@contextmanager
def open_run(out: Path, plan: RunPlan, free: Collection[str] = ()) -> Iterator[None]:
    """Makes the folder with its run.yaml, and locks it. Raises UserError when it can't be written, or when another
    command has it, or has started another run there since `find_run` looked."""
    with catch_write_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    with run_lock(out):
        if find_run(out, plan, Saved, free):
            raise UserError(f"{out}: another command has just finished this run; run it again to see the result")
        with catch_write_errors(out):
            write_run(out, plan.as_dict())
        yield


@contextmanager
def run_lock(out: Path) -> Iterator[None]:
    """Context in which only one command at a time writes a run's files.

    Raises UserError if another command does, or if the folder has a link that leads out of it.
    """
    with ExitStack() as stack:
        with catch_write_errors(out):
            stack.enter_context(exclusive_lock(out))
            refuse_links(out)
        try:
            yield
        except KeyboardInterrupt as stop:
            for name, what in ((JOURNAL, "batches of scores"), (TRIALS, "finished trials")):
                if count := len(read_lines(out / name)):
                    stop.add_note(f"{out} keeps {what}: {count}")  # shown to the person who stopped it
            raise


@contextmanager
def catch_write_errors(out: Path) -> Iterator[None]:
    """Turns an error while writing to the run folder into one line; finished files stay."""
    try:
        yield
    except OSError as error:
        # The error of shutil.copytree lists (from, to, why) of each file.
        first = error.args[0][0][2] if isinstance(error, shutil.Error) else error.strerror
        why = one_line(first or error)
        raise UserError(f"{out}: can't be written ({why}); fix that and run the command again") from error


def write_run(out: Path, content: Mapping[str, Any]) -> None:
    """Writes run.yaml, completely or not at all."""
    write_yaml(out / "run.yaml", content)


def read_run(out: Path) -> SavedRun:
    """The run.yaml of a finished run of filter. Raises UserError if there is none."""
    file = out / "run.yaml"
    if not file.is_file():
        raise UserError(f"{out}: not a run folder (it has no run.yaml)")
    refuse_links(out)
    saved = read_yaml(file)
    if "summary" not in saved:
        raise UserError(f"{out}: the run is not finished; run the same filter command again to resume it")
    remove_leftovers(out, JOURNAL)
    if isinstance(saved["summary"], dict) and "accepted" in saved["summary"]:
        raise UserError(f"{out}: a run of tune; its rows and their scores are in {out / 'screen'}")
    try:
        run = SavedRun.model_validate(saved, strict=True)
        where = _unusable(run)
    except ValidationError as error:
        run, where = None, ".".join(map(str, error.errors()[0]["loc"]))
    if run is None or where:
        raise UserError(f"{file}: damaged ({where}); filter again into another -o")
    return run


def _unusable(run: SavedRun) -> str | None:
    """The entry of a run.yaml that prevents reading its rows as before; None if there is none."""
    columns = run.settings.get("columns", ())
    usable = {
        "input.layout": run.input.layout in (*LAYOUTS, "mapped"),
        "settings.split": "split" in run.settings,
        "settings.columns": columns is None or isinstance(columns, dict),
        "settings.trainer": run.settings.get("trainer", "trl") in [*RULES],
    }
    return next((name for name, is_usable in usable.items() if not is_usable), None)


def rows_file(out: Path, verdict: str) -> Path | None:
    """The file or folder of the run's rows with this verdict; None if there is none."""
    return next((path for path in (out / verdict, *sorted(out.glob(f"{verdict}.*"))) if path.exists()), None)


def read_table(
    out: Path,
    columns: Sequence[str] | None = None,
    *,
    without: Collection[str] = (),
    verdict: str | None = None,
    coded: Sequence[str] = (),
) -> "Table":
    """The run's scores.parquet: every column, some, or all without some; every row, or those of one verdict. Columns in
    `coded` hold each text once.

    Raises UserError where the file is damaged.
    """
    import pyarrow.parquet as pq

    file = out / "scores.parquet"
    try:
        with file.open("rb") as stream:
            names = columns or [name for name in pq.read_schema(stream).names if name not in without]
            only = [("verdict", "=", verdict)] if verdict else None
            table = pq.read_table(stream, columns=names, filters=only, read_dictionary=list(coded))
        table.validate(full=True)
        _check_values(table)
        return table
    except (OSError, ValueError, KeyError) as error:  # pyarrow's errors are kinds of these
        why = one_line(error, 120)
        raise UserError(f"{file}: can't be read ({why}); filter again into another -o") from None


def _check_values(table: "Table") -> None:
    """Raises ValueError where a column that decides about rows holds something else than a run writes there."""
    import pyarrow as pa

    for name in {"place", "group", "verdict", "score"} & set(table.column_names):
        kind = table[name].type
        wanted = pa.float64() if name == "score" else pa.string()
        if (kind.value_type if pa.types.is_dictionary(kind) else kind) != wanted or table[name].null_count:
            raise ValueError(f"{name} is not all {wanted}")
    if "verdict" in table.column_names and (other := {*table["verdict"].unique().to_pylist()} - {*VERDICTS}):
        raise ValueError(f"{other.pop()[:40]!r} is not a verdict")


def shared_texts(column: "ChunkedArray") -> list[str]:
    """The texts of a column that has no nulls; equal ones are one object, so each row takes eight bytes."""
    coded = column.dictionary_encode().unify_dictionaries().combine_chunks()
    return np.array(coded.dictionary.to_pylist(), dtype=object)[coded.indices.to_numpy()].tolist()


def source_of_run(saved: SavedRun, out: Path | None = None) -> Source:
    """The input of the run in `out`, opened again. Raises UserError when it was stdin, or the file has changed."""
    given = saved.input
    if given.path == "-":
        raise UserError("the rows of this run came from stdin, so they can't be read again; filter a file instead")
    source = open_source(given.path, given.format if given.format != "hub" else None, saved.settings["split"], out)
    if source.sha256 != given.sha256:
        raise UserError(f"{given.path}: changed since this run (its checksum differs); filter it again")
    return source


def rows_of_run(saved: SavedRun, out: Path | None = None) -> Iterator[Row]:
    """The rows of a run's input, read again. Raises UserError as `source_of_run` does."""
    return read_rows(source_of_run(saved, out))


def row_of_run(out: Path, row: int) -> tuple[SavedRun, Row]:
    """(run.yaml, row number `row`, from 1) of the run in `out`. Raises UserError if one of them does not exist."""
    saved = read_run(out)
    found = next((r for r in rows_of_run(saved, out) if r.index == row - 1), None)
    if found is None:
        raise UserError(f"{out}: no row {row}; it has {saved.summary.rows} rows")
    return saved, found
