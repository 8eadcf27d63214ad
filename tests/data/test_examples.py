"""Examples in a file and encoding in processes: the same, row by row, as one by one in memory."""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from gradshield.base.errors import UserError
from gradshield.data import examples as module
from gradshield.data import open_source, read_rows, to_conversation
from gradshield.data.columns import Groups, Places
from gradshield.data.encode import Example
from gradshield.data.examples import Examples, in_processes, row_numbers, token_counts
from gradshield.data.rows import Row

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def rows(count):
    return (Row(n, "a.jsonl", n + 1, b"x" * (n % 50), {"n": n}, None) for n in range(count))


@pytest.fixture(autouse=True)
def several(monkeypatch):
    monkeypatch.setattr(module, "MIN_ROWS_FOR_WORKERS", 10)
    monkeypatch.setattr(module, "CHUNK", 7)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)


def test_examples_come_back_as_they_were_put_in():
    draw = np.random.default_rng(0)
    put = [
        Example(3 * n, draw.integers(0, 99, n + 1, dtype=np.int32), draw.integers(0, 2, n + 1).astype(bool))
        for n in range(50)
    ]
    kept = Examples()
    for example in put:
        kept.append(example)
    assert len(kept) == 50 and len(kept[10:20]) == 10
    for one, other in zip([*kept], put, strict=True):
        assert one.row == other.row
        np.testing.assert_array_equal(one.ids, other.ids)
        np.testing.assert_array_equal(one.mask, other.mask)
    assert row_numbers(kept).tolist() == row_numbers(put).tolist()
    assert token_counts(kept).tolist() == token_counts(put).tolist() == list(range(1, 51))


def test_a_full_disk_is_one_line(monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    kept = Examples()
    monkeypatch.setattr(kept, "_file", SimpleNamespace(write=full))
    monkeypatch.setattr("tempfile.TemporaryFile", full)
    one = Example(0, np.zeros(1, dtype=np.int32), np.ones(1, dtype=bool))
    for doing in (Examples, lambda: kept.append(one)):
        with pytest.raises(UserError, match="free some space or set TMPDIR"):
            doing()


@pytest.mark.parametrize("count", [0, 1, 10, 11, 500])
def test_rows_are_worked_on_in_order_whichever_process_does_it(count):
    done = list(in_processes(lambda row: (row.record["n"] ** 2, os.getpid()), rows(count)))
    assert [(row, square) for row, (square, _) in done] == [(row, row.index**2) for row in rows(count)]
    others = {pid for _, (_, pid) in done} - {os.getpid()}
    assert len(others) == (0 if count <= 10 or sys.platform != "linux" else min(3, -(-(count - 10) // 7)))


def test_rows_of_any_depth_are_read_in_other_processes(tmp_path):
    cells = ["[" * depth + "]" * depth for depth in range(1, 1000, 7)]
    deep = [f'{{"prompt": "a", "completion": "b", "x": {cell}}}\n' for cell in cells]
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 11 + "".join(deep))
    done = list(in_processes(lambda row: row.problem, read_rows(open_source(tmp_path / "a.jsonl"))))
    assert [row.index for row, _ in done] == list(range(11 + len(deep)))
    assert [found for _, found in done] == [row.problem for row, _ in done]
    conversations = [{"messages": TURNS, "tools": cell} for cell in cells]
    read = in_processes(
        lambda row: to_conversation(row.record, "messages"),
        (Row(n, "a", n, b"", record, None) for n, record in enumerate(conversations * 2)),
    )
    assert len(list(read)) == 2 * len(cells)


def test_what_goes_wrong_in_a_process_is_raised_here_and_no_process_is_left():
    def work(row):
        if row.index == 300:
            raise UserError("no chat template")
        return os.getpid()

    seen = set()
    with pytest.raises(UserError, match="no chat template"):
        for _, pid in in_processes(work, rows(500)):
            seen.add(pid)
    for pid in seen - {os.getpid()}:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do all in one process")
def test_a_process_that_is_ended_is_one_line():
    def work(row):
        if row.index == 300:
            os.kill(os.getpid(), signal.SIGKILL)
        return row.index

    with pytest.raises(UserError, match="a process that encodes rows was killed"):
        list(in_processes(work, rows(500)))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do all in one process")
def test_no_process_outlives_the_first_one(tmp_path):
    code = (
        "import os, pathlib, sys, time\n"
        "from gradshield.data.examples import in_processes\n"
        "from gradshield.data.rows import Row\n"
        "os.sched_getaffinity = lambda _: {0, 1, 2}\n"
        "place = pathlib.Path(sys.argv[1])\n"
        "def work(row):\n"
        "    (place / str(os.getpid())).touch()\n"
        "    time.sleep(0.001)\n"
        "rows = (Row(n, 'a', n, b'', {}, None) for n in range(10**6))\n"
        "for _ in in_processes(work, rows): pass\n"
    )
    first = subprocess.Popen([sys.executable, "-c", code, tmp_path])
    while len(list(tmp_path.iterdir())) < 3:
        time.sleep(0.1)
    first.kill()
    first.wait()
    end = time.monotonic() + 60
    while any(os.path.exists(f"/proc/{file.name}") for file in tmp_path.iterdir()):
        assert time.monotonic() < end
        time.sleep(0.1)


def test_groups_and_places_are_kept_in_a_few_bytes_a_row(monkeypatch):
    monkeypatch.setattr("gradshield.data.columns.MAX_GROUPS", 2)
    groups, places = Groups(), Places(["a", "b"])
    for n, name in enumerate(["x", "y", "z", "x"]):
        groups.append(name, "file")
        places.append(Row(n, "ab"[n % 2], n + 1, b"", {}, None))
    assert list(groups) == ["x", "y", "file", "x"] and groups[1:3] == ["y", "file"]
    assert list(places) == ["a:1", "b:2", "a:3", "b:4"] and places[1:3] == ["b:2", "a:3"]
