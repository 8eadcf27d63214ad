"""Output files of commands: written completely or not at all, never through a link, and checked when read."""

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import yaml
from pydantic import TypeAdapter

from gradshield.base.errors import UserError, one_line

T = TypeVar("T")
_SUM = "# sha256 of what follows: "
LOCK = ".lock"  # in a folder while a command writes to it


@contextmanager
def replace_when_done(file: Path) -> Iterator[Path]:
    """A temporary path next to `file`, which replaces `file` when the block ends. After an error it is deleted.

    There may be one writer at a time: hold the folder's lock. Raises OSError.
    """
    temporary = file.with_name(f".{file.name}")
    temporary.unlink(missing_ok=True)  # left by a kill, or a planted link
    try:
        yield temporary
        os.replace(temporary, file)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


@contextmanager
def write_whole(file: Path) -> Iterator[BinaryIO]:
    """A stream whose bytes become `file`, completely or not at all (`replace_when_done`). Raises OSError."""
    with replace_when_done(file) as temporary, open(temporary, "xb") as stream:  # never opens what is there already
        yield stream
        stream.flush()
        os.fsync(stream.fileno())


def write_text(file: Path, text: str) -> None:
    """Writes `text` as UTF-8, completely or not at all; half a surrogate pair is escaped. Raises OSError."""
    with write_whole(file) as stream:
        stream.write(text.encode("utf-8", "backslashreplace"))


def write_yaml(file: Path, content: Mapping[str, Any]) -> None:
    """Writes JSON-like `content` as YAML, under a comment with its checksum. Raises OSError."""
    text = yaml.safe_dump(json.loads(json.dumps(content)), sort_keys=False, allow_unicode=True)
    write_text(file, f"{_SUM}{_digest(text)}\n{text}")


def read_yaml(file: Path) -> dict[str, Any]:
    """The content that `write_yaml` wrote. Raises UserError if the file is damaged or was not written by it."""
    why = "its checksum differs"
    try:
        text = file.read_text(encoding="utf-8")
        first, _, rest = text.partition("\n")
        intact = not first.startswith(_SUM) or first.removeprefix(_SUM) == _digest(rest)
        content = yaml.safe_load(text) if intact else None
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        why, content = one_line(error, 120), None
    if not isinstance(content, dict):
        raise UserError(f"{file}: damaged ({why}); delete {file.parent} to start again, or choose another -o")
    return content


def read_jsonl(file: Path | Traversable) -> list[dict[str, Any]]:
    """The objects of a file, one per line. Raises OSError or ValueError."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8-sig").split("\n") if line.strip()]


def read_json(file: Path, kind: type[T]) -> T:
    """The file's JSON, which must be of this type. Raises UserError if it is damaged."""
    try:
        return TypeAdapter(kind).validate_json(file.read_bytes())
    except (OSError, ValueError) as error:
        why = one_line(error, 120)
        raise UserError(f"{file}: damaged ({why}); delete it, and run the same command again") from None


def append_line(file: Path, entry: Mapping[str, Any]) -> None:
    """Appends `entry` to a journal as one line of JSON with a checksum, and syncs it to disk. Raises OSError."""
    text = json.dumps(entry)
    line = json.dumps({**entry, "checksum": _digest(text)}) + "\n"
    with file.open("ab", buffering=0) as stream:
        before = stream.seek(0, os.SEEK_END)
        try:
            if stream.write(line.encode()) < len(line):
                raise OSError(28, "No space left on device")
            os.fsync(stream.fileno())
        except OSError:
            with suppress(OSError):
                stream.truncate(before)  # else the next line would continue this one
            raise


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The journal's entries up to the first damaged line, which a kill or a full disk can leave.

    The rest of the file is cut off, so that the next line can be appended. Raises OSError, and UserError if there is a
    folder in its place.
    """
    if not file.exists():
        return []
    if file.is_dir():
        raise UserError(f"{file}: expected a file, found a folder; remove it, and run the same command again")
    entries, whole = [], 0
    with file.open("rb") as stream:
        for line in stream:
            try:
                entry = json.loads(line)
                checksum = entry.pop("checksum")
                intact = line.endswith(b"\n") and checksum == _digest(json.dumps(entry))
            except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
                break
            if not intact:
                break
            entries.append(entry)
            whole += len(line)
    if whole < file.stat().st_size:
        os.truncate(file, whole)
    return entries


@contextmanager
def exclusive_lock(folder: Path, wait: bool = False) -> Iterator[None]:
    """Context that only one process at a time may enter.

    Raises UserError if another process is in it, unless this one may `wait`. Raises OSError if the folder is not
    writable.
    """
    from filelock import FileLock, Timeout

    file = folder / LOCK
    lock = FileLock(file, timeout=-1 if wait else 0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"{folder}: another command is writing its files; wait for it to end") from None
    try:
        yield
    finally:
        with suppress(OSError):
            file.unlink(missing_ok=True)  # while it is held: whoever waits for it notices that it is gone
        lock.release()


def remove_leftovers(folder: Path, *names: str) -> None:
    """Removes the lock and the files of these names that a killed command left. Does nothing if the lock is held."""
    if any((folder / name).exists() for name in (LOCK, *names)):
        with suppress(UserError, OSError), exclusive_lock(folder):
            for name in names:
                (folder / name).unlink(missing_ok=True)


def refuse_links(folder: Path) -> None:
    """Raises UserError if the folder is a link, or holds a link that leads out of it, or holds anything but files and
    folders. With such a link, someone could make us write to another place."""
    if folder.is_symlink():
        raise UserError(f"{folder}: a symbolic link; name the folder that it points to")
    home = os.path.realpath(folder)
    for place, folders, names in os.walk(folder):
        for name in (*folders, *names):
            file = Path(place, name)
            mode = file.lstat().st_mode
            if stat.S_ISLNK(mode) and not Path(os.path.realpath(file)).is_relative_to(home):
                raise UserError(f"{file}: a symbolic link out of the run folder; remove it, or choose another -o")
            if stat.S_ISLNK(mode) and not os.path.exists(file):  # for example a loop
                raise UserError(f"{file}: a symbolic link that leads nowhere; remove it, or choose another -o")
            if not (stat.S_ISLNK(mode) or stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise UserError(f"{file}: neither a file nor a folder; remove it, or choose another -o")


def write_cache(file: Path, content: bytes) -> None:
    """Writes a file in the cache folder. Failing to write it is not an error."""
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(file.parent, wait=True), write_whole(file) as stream:
            stream.write(content)


def cache_folder() -> Path:
    """The folder for cached results about a model: GRADSHIELD_CACHE, else ~/.cache/gradshield."""
    return Path(os.environ.get("GRADSHIELD_CACHE") or Path.home() / ".cache" / "gradshield")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
