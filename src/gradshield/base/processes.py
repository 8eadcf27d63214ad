"""Several processes for one command (accelerate launch, torchrun): the first leads, and the others only run the calls
that all processes have to make.

If one dies, the others end too, by the launcher or because the connection closes; the same command then resumes.
Imports no torch before the first such call.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

from gradshield.base.errors import Diverged, UserError

T = TypeVar("T")
R = TypeVar("R")
# As a launcher says them: torchrun and accelerate, then what mpirun leaves (which accelerate reads, too).
_COUNT = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_RANK = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
_TIMEOUT = timedelta(days=60)  # for the first process, which scores and measures between two trainings


def processes() -> int:
    """The number of processes that a launcher started for this command; 1 without a launcher."""
    return _number(_COUNT, 1)


def rank() -> int:
    """The number of this process among them, from 0."""
    return 0 if processes() == 1 else _number(_RANK, 0)


def is_first() -> bool:
    """True in the one process that reads, writes and prints."""
    return rank() == 0


def lead_processes(work: Callable[[Callable[..., R]], T], task: Callable[..., R], *, cpu: bool) -> T | None:
    """Returns `work(task)`, where each call of the task happens in all processes at once, with the same arguments.

    `work` runs in the first process only; the others wait for its calls and return what it returned, or None when it
    ended by an error. `cpu` says that no GPU is used. Raises UserError when another process is gone.
    """
    if processes() == 1:
        return work(task)
    group = _join(cpu)
    if not is_first():
        while (message := _broadcast(None, group))[0] == "call":
            with suppress(Diverged):  # so has the first, and it knows what to do
                task(*message[1])
        return message[1]

    apart = False

    def call(*arguments: Any) -> R:
        nonlocal apart
        _broadcast(("call", arguments), group)
        try:
            return task(*arguments)
        except BaseException as error:
            apart = not isinstance(error, Diverged)
            raise

    result = None
    try:
        result = work(call)
    finally:
        if not apart:  # else the others may wait in the midst of a step, and hear only that this process ends
            with suppress(UserError):
                _broadcast(("end", result), group)
    return result


def _broadcast(message: Any, group: Any) -> Any:
    """Sends the first process's message to the others; returns it in all of them."""
    import torch
    import torch.distributed as dist

    box = [message]
    try:
        dist.broadcast_object_list(box, src=0, group=group, device=torch.device("cpu"))
    except RuntimeError as error:  # its connection was closed
        raise UserError("another process of this command ended; start it again to resume") from error
    return box[0]


def is_lost_connection(error: BaseException) -> bool:
    """True for the error of a collective call during which another process ended."""
    return isinstance(error, RuntimeError) and any(word in str(error) for word in ("by peer", "gloo/transport", "NCCL"))


def _join(cpu: bool) -> Any:
    """Connects to the other processes, over a separate connection that may be idle for a long time."""
    import atexit

    import torch.distributed as dist
    from accelerate import PartialState

    known = dist.is_initialized()
    PartialState(cpu=cpu)
    if not dist.is_initialized():  # mpirun says what accelerate reads on a CPU only
        raise UserError("these processes are not connected: start them with torchrun or accelerate launch")
    if not known:
        atexit.register(dist.destroy_process_group)
    return dist.new_group(backend="gloo", timeout=_TIMEOUT)


def _number(names: tuple[str, ...], otherwise: int) -> int:
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdecimal()), otherwise)
