"""The n-th file operation of this process goes wrong: the process is killed there, or from there on the disk is full.

Operations are counted where Python asks the system for them: opening to write, each write, fsync, rename, unlink,
mkdir, rmdir, truncate. A kill in a write leaves half of it on the disk. Pipes and devices are not on a disk.
"""

import builtins
import errno
import io
import os
import signal
import stat
from collections.abc import Callable
from typing import Any

GROWING = ("open", "write", "mkdir", "sendfile")  # what a full disk refuses
OTHERS = ("fsync", "replace", "rename", "unlink", "remove", "rmdir", "truncate", "ftruncate", "link")


class Faults:
    """Counts the operations; `at` is the one that goes wrong (0: none), `full` says how."""

    def __init__(self, at: int, full: bool) -> None:
        self.at, self.full, self.count = at, full, 0

    def step(self, name: str, half: Callable[[], Any] = lambda: None) -> None:
        """One operation; `half` does half of a write."""
        if self.full and name not in GROWING:
            return
        self.count += 1
        if not self.at or self.count < self.at:
            return
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        half()
        os.kill(os.getpid(), signal.SIGKILL)


def install(at: int, full: bool) -> Faults:
    """Patches this process, for good."""
    faults = Faults(at, full)
    real_open, real_os_open = builtins.open, os.open

    class File(io.FileIO):
        def write(self, data: Any) -> int:
            view = memoryview(data).cast("B")
            faults.step("write", lambda: super(File, self).write(view[: len(view) // 2]))
            return super().write(view)

    def opened(file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **named: Any) -> Any:
        if not set(mode) & set("wxa+") or isinstance(file, int):
            return real_open(file, mode, buffering, *rest, **named)
        faults.step("open")
        names = ("encoding", "errors", "newline", "closefd", "opener")
        given = dict(zip(names, rest)) | named
        raw = File(file, mode.replace("b", "").replace("t", ""), True, given.get("opener"))
        if buffering == 0:
            return raw
        buffer = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        if "b" in mode:
            return buffer
        return io.TextIOWrapper(buffer, given.get("encoding"), given.get("errors"), given.get("newline"))

    def os_open(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and path != os.devnull:
            faults.step("open")
        return real_os_open(path, flags, *rest, **named)

    def patched(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*arguments: Any, **named: Any) -> Any:
            if _on_disk(arguments[0]):
                faults.step(name)
            return real(*arguments, **named)

        return call

    builtins.open = io.open = opened  # type: ignore[assignment]
    os.open = os_open  # type: ignore[assignment]
    for name in ("write", "mkdir", "sendfile", *OTHERS):
        setattr(os, name, patched(name))
    return faults


def _on_disk(file: Any) -> bool:
    """Whether it is a path, or the number of an open file or folder."""
    if not isinstance(file, int):
        return True
    mode = os.fstat(file).st_mode
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode)
