"""A part's work in a process of its own, forked from one that has everything imported, with its output and a limit."""

import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CRASHED = 70  # exit code of an error that nobody turned into one line


@dataclass(frozen=True)
class Ended:
    """How the process ended."""

    code: int  # negative: the signal
    said: str  # stdout and stderr
    answer: str  # what `work` returned
    peak: int  # bytes of memory at most

    @property
    def clean(self) -> bool:
        """Neither a traceback nor a signal."""
        return self.code >= 0 and self.code != CRASHED and "Traceback (most recent call last)" not in self.said


def apart(work: Callable[[], object], folder: Path, seconds: float = 600, memory: int = 0) -> Ended:
    """Runs `work` in a fork, in the working directory `folder`; `memory` (bytes) bounds its address space."""
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as answer:
        sys.stdout.flush()
        child = os.fork()
        if not child:
            _child(work, folder, said.fileno(), answer.fileno(), memory)
        start = time.monotonic()
        while True:
            done, status, used = os.wait4(child, os.WNOHANG)
            if done:
                break
            if time.monotonic() - start > seconds:
                os.kill(child, signal.SIGALRM)
            time.sleep(0.005)
        said.seek(0)
        answer.seek(0)
        texts = [stream.read().decode("utf-8", "replace") for stream in (said, answer)]
        return Ended(os.waitstatus_to_exitcode(status), texts[0], texts[1], used.ru_maxrss * 1024)


def _child(work: Callable[[], object], folder: Path, said: int, answer: int, memory: int) -> None:
    code, write = CRASHED, os.write
    try:
        os.dup2(said, 1)
        os.dup2(said, 2)
        os.chdir(folder)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        if memory:
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        write(answer, str(work()).encode("utf-8", "replace"))
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1 if stop.code else 0
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)
