"""A real Ray cluster on this machine scores as the local engine does, to the byte, whatever dies in the middle."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest
import torch

from gradshield.base.assets import ASSETS
from gradshield.base.errors import UserError
from gradshield.base.settings import FilterSettings
from gradshield.data.requests import read_requests
from gradshield.models.load import load_model
from gradshield.scoring import ray as engine
from gradshield.scoring.cache import write_cache
from gradshield.scoring.check import AlignmentCheck, check_cache_file
from gradshield.screen import filter as filtering
from gradshield.screen import validate
from gradshield.screen.filter import run_filter

ROWS = 900
OUTPUTS = ("kept.jsonl", "quarantined.jsonl", "set_aside.jsonl", "scores.parquet")


@pytest.fixture
def one_thread():
    """Here as in the workers: another number of threads may sum in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def train(tmp_path, tiny_folder, monkeypatch, one_thread) -> Path:
    """Rows of many lengths; the random model counts as aligned, here and in every worker."""
    monkeypatch.setenv("GRADSHIELD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    probes = read_requests(ASSETS / "probes.jsonl")
    check = AlignmentCheck(tuple(probes), (True,) * len(probes), ("No",) * len(probes), (1.0,) * len(probes), ())
    write_cache(check_cache_file(load_model(tiny_folder)), json.dumps(asdict(check)).encode())
    file = tmp_path / "train.jsonl"
    rows = [{"prompt": f"Question {n} " * (n % 5 + 1), "completion": f"Answer {n}" * (n % 3)} for n in range(ROWS)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def settings(folder: str, **more) -> FilterSettings:
    shape = {"scorer": "fihs:normalise=module,probes=2", "threshold": "share", "value": 0.25, "batch_tokens": 256}
    return FilterSettings(model=folder, **{**shape, **more})


def actors() -> list[int]:
    """Processes of this test's Ray actors that hold a model: nobody else's, as one of them is killed."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and " ".join(process.cmdline()).startswith("ray::MapWorker"):
                found.append(process.pid)
    return found


def kill_an_actor_once_results_come(journal: Path, killed: list[int], finished: threading.Event) -> None:
    while not finished.is_set() and not killed:
        if journal.exists() and journal.stat().st_size and actors():
            killed.append(actors()[0])
            os.kill(killed[0], signal.SIGKILL)
        time.sleep(0.002)


@pytest.mark.slow
def test_a_killed_actor_costs_its_block_and_the_bytes_are_those_of_the_local_engine(tiny_folder, train, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    expected = run_filter(str(train), here, settings(tiny_folder))
    killed: list[int] = []
    finished = threading.Event()
    killer = threading.Thread(target=kill_an_actor_once_results_come, args=(there / "scores.partial", killed, finished))
    killer.start()
    try:
        summary = run_filter(str(train), there, settings(tiny_folder, engine="ray", workers=2))
    finally:
        finished.set()
        killer.join()
    assert killed and not Path(f"/proc/{killed[0]}").exists()
    assert summary.rows == expected.rows == ROWS and summary.threshold == expected.threshold
    for name in OUTPUTS:
        assert (there / name).read_bytes() == (here / name).read_bytes(), name
    until = time.monotonic() + 30
    while actors() and time.monotonic() < until:
        time.sleep(0.1)
    assert not actors()


@pytest.mark.slow
def test_a_file_in_several_parts_ends_alike(tiny_folder, train, tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    run_filter(str(train), here, settings(tiny_folder))
    monkeypatch.setattr(engine, "PART_BYTES", 50_000)
    real, parts = engine._scored, []
    monkeypatch.setattr(engine, "_scored", lambda part, *more: (parts.append(len(part)), real(part, *more))[1])
    run_filter(str(train), there, settings(tiny_folder, engine="ray", workers=2))
    assert len(parts) > 1
    for name in OUTPUTS:
        assert (there / name).read_bytes() == (here / name).read_bytes(), name


@pytest.mark.slow
def test_what_a_killed_driver_left_is_taken_up_by_either_engine(tiny_folder, train, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    run_filter(str(train), here, settings(tiny_folder))
    given = settings(tiny_folder, engine="ray", workers=2)  # so that a worker has one thread, as here
    code = (
        "import sys, json; from pathlib import Path; from gradshield.screen.filter import run_filter;"
        "from gradshield.base.settings import FilterSettings;"
        "run_filter(sys.argv[1], Path(sys.argv[2]), FilterSettings(**json.loads(sys.argv[3])))"
    )
    unsaved = {"engine": "ray", "workers": 2, "batch_tokens": 256}
    arguments = [str(train), str(there), json.dumps({**given.model_dump(), **unsaved})]
    driver = subprocess.Popen([sys.executable, "-c", code, *arguments])
    journal = there / "scores.partial"
    while driver.poll() is None and not (journal.exists() and journal.stat().st_size):
        time.sleep(0.002)
    driver.kill()
    driver.wait()
    assert 0 < journal.read_bytes().count(b"\n") < ROWS // 4
    run_filter(str(train), there, settings(tiny_folder))
    for name in OUTPUTS:
        assert (there / name).read_bytes() == (here / name).read_bytes(), name


@pytest.mark.slow
def test_a_users_mistake_in_a_worker_is_one_line(tiny_folder):
    def build():
        raise UserError("model x: no such folder")

    from conftest import random_examples

    with pytest.raises(UserError, match=r"^model x: no such folder$"):
        list(engine.ray_engine(build, [], 1)([(0, random_examples(2, 50))]))


def test_ray_that_is_missing_is_named_before_a_model_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr(validate, "find_spec", lambda name: None)
    monkeypatch.setattr(filtering, "load_settings_model", lambda settings: pytest.fail("loaded"))
    with pytest.raises(UserError, match=r"ray\[data\]"):
        run_filter("no such file", tmp_path / "run", FilterSettings(engine="ray"))


def test_how_a_run_is_computed_is_no_part_of_what_it_is(tiny_folder):
    assert settings(tiny_folder, engine="ray", workers=2).model_dump() == settings(tiny_folder).model_dump()
