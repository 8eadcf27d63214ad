"""The run folder: run.yaml says what the run is and, at its end, what came out; it is taken up, or refused, by that."""

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from gradshield.base.errors import UserError
from gradshield.data import Row, Source, open_source, read_rows
from gradshield.data.rows import expanded

if TYPE_CHECKING:
    from gradshield.models.load import Model

JOURNAL = "scores.partial"  # finished batches, while a run is under way


def plan_of(source: Source, model: "Model", layout: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What makes a run the run it is: resolved settings, the file's and the model's identity, versions."""
    local = source.path != "-" and expanded(source.path).exists()  # else the id of a Hub dataset
    return {
        "input": {
            "path": str(expanded(source.path).resolve()) if local else source.path,
            "format": source.format,
            "layout": layout,
            "sha256": source.sha256,
        },
        "model": {"name": model.name, "fingerprint": model.fingerprint},
        "settings": dict(settings),
        "versions": {name: version(name) for name in ("gradshield", "torch", "transformers", "trl")},
    }


def checksums(*names: str | None) -> dict[str, str]:
    """sha256 (16 hex digits) of each of the names that is a file: what must be the same beside the settings."""
    files = {name: expanded(name) for name in names if name}
    return {name: hashlib.sha256(p.read_bytes()).hexdigest()[:16] for name, p in files.items() if p.is_file()}


def find_run(out: Path, plan: Mapping[str, Any], free: Collection[str] = ()) -> dict[str, Any] | None:
    """The summary of the plan's run when it is done in `out`, None when it is to be begun or to be taken up there.

    The same rows may come from another path, and settings in `free` may be others where the run is not done. Raises
    UserError when the folder is another run's, or no run's.
    """
    file = out / "run.yaml"
    with writing(out):  # a folder that can't be looked into can't be written to either
        begun = file.exists()
        above = next(p for p in (out, *out.absolute().parents) if p.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):  # else it would come out after long work only
            raise UserError(f"{out}: {above} is no folder that can be written to; choose another -o")
        if not begun and out.exists() and (not out.is_dir() or any(p.name != ".run.yaml" for p in out.iterdir())):
            raise UserError(f"{out}: not empty and not a run; choose another folder with -o")
    if not begun:
        return None
    saved = _load(file)
    other = saved.keys() ^ plan.keys()
    if other - {"summary", "review"}:
        raise UserError(f"{out}: a run of another command ({', '.join(sorted(other))}); choose another -o")
    for part, wanted in plan.items():
        for key, value in wanted.items():
            there = (saved.get(part) or {}).get(key)
            may = (part, key) == ("input", "path") or (key in free and "summary" not in saved)
            if there != value and not may:
                raise UserError(f"{out}: a run with another {part} ({key}: {there}, not {value}); choose another -o")
    return saved.get("summary")


@contextmanager
def begun(out: Path, plan: Mapping[str, Any], free: Collection[str] = ()) -> Iterator[None]:
    """Makes the folder with its run.yaml; within it, the folder is this call's alone. Raises UserError when it can't be
    written, or when another command has it, or has begun another run there since `find_run` looked."""
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    with alone(out):
        if find_run(out, plan, free):
            raise UserError(f"{out}: another command has just finished this run; the same command shows what came out")
        with writing(out):
            write_run(out, plan)
        yield


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Only one command at a time writes a run's files. Raises UserError where another does."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with writing(out):
        folder = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{out}: another command is writing its files; wait for it to end") from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(folder)


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Turns what goes wrong in writing to the run folder into one line; what is finished there stays."""
    try:
        yield
    except OSError as error:
        why = error.strerror or " ".join(str(error).split())
        raise UserError(f"{out}: can't be written ({why}); mend that and run it again, or choose another -o") from error


def write_run(out: Path, content: Mapping[str, Any]) -> None:
    """Writes run.yaml, whole or not at all."""
    text = yaml.safe_dump(json.loads(json.dumps(content)), sort_keys=False, allow_unicode=True)
    temporary = out / ".run.yaml"
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, out / "run.yaml")


def read_run(out: Path) -> dict[str, Any]:
    """The contents of a run's run.yaml. Raises UserError where there is no finished run."""
    file = out / "run.yaml"
    if not file.is_file():
        raise UserError(f"{out}: no run.yaml in it, so not a run folder")
    saved = _load(file)
    if "summary" not in saved:
        raise UserError(f"{out}: the run is not finished; give the same filter command again")
    if "threshold" not in saved["summary"]:
        raise UserError(f"{out}: a run of tune; its rows and their scores are in {out / 'screen'}")
    return saved


def source_of_run(saved: Mapping[str, Any]) -> Source:
    """A run's input, opened again. Raises UserError when it was stdin, or the file is another by now."""
    given = saved["input"]
    if given["path"] == "-":
        raise UserError("the rows of this run came from stdin, so they can't be read again; filter a file instead")
    source = open_source(
        given["path"], given["format"] if given["format"] != "hub" else None, saved["settings"]["split"]
    )
    if source.sha256 != given["sha256"]:
        raise UserError(f"{given['path']}: not the file of this run any more (its checksum differs)")
    return source


def rows_of_run(saved: Mapping[str, Any]) -> Iterator[Row]:
    """The rows of a run's input, read again. Raises UserError as `source_of_run` does."""
    return read_rows(source_of_run(saved))


def _load(file: Path) -> dict[str, Any]:
    try:
        saved = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: can't be read ({' '.join(str(error).split())[:120]})") from error
    if not isinstance(saved, dict):
        raise UserError(f"{file}: not a run's run.yaml")
    return saved
