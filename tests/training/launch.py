"""Starts a command in several processes, as a launcher would, and waits for all of them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
DRIVER = str(TESTS / "launched.py")


def environment(**more: str) -> dict[str, str]:
    paths = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **more}


def start(
    *arguments: str, program: tuple[str, ...] = (DRIVER,), count: int = 2, **more: str
) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each process. There is no launcher that would end the rest when one dies."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
    started = []
    for rank in range(count):
        own = environment(**place, RANK=str(rank), LOCAL_RANK=str(rank), **more)
        command = [sys.executable, *program, *arguments]
        started.append(subprocess.Popen(command, env=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    try:
        said = [process.communicate(timeout=100) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *words) for process, words in zip(started, said)]
