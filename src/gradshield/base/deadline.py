"""Limits on the time and memory of computation that foreign code controls, such as the loops of a chat template."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_measured = (0.0, 0)  # when, and the bytes of this process's address space then


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in its block after so many seconds of CPU time.

    It interrupts Python code only, and only in the main thread; in other threads there is no limit.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError(f"it does not end within {seconds:g} s")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextmanager
def memory_limit(size: int) -> Iterator[None]:
    """Raises MemoryError in its block where the process would take so many bytes more than it has.

    It holds on Linux, and only in the main thread; elsewhere there is no limit.
    """
    if threading.current_thread() is not threading.main_thread() or sys.platform != "linux":
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = _address_space() + size
    if soft == resource.RLIM_INFINITY or limit < soft:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    except MemoryError:
        raise MemoryError(f"it takes more than {size >> 20} MB of memory") from None
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _address_space() -> int:
    """Bytes of this process's address space, at most 20 ms ago: asking the system takes a fifth of a rendering."""
    global _measured
    if time.monotonic() - _measured[0] > 0.02:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        _measured = time.monotonic(), pages * os.sysconf("SC_PAGE_SIZE")
    return _measured[1]
