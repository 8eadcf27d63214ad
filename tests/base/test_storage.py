"""A file is written whole or not at all and never through a link; a damaged one is refused, its journal cut back."""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from gradshield.base.errors import UserError
from gradshield.base.storage import (
    append_line,
    exclusive_lock,
    read_json,
    read_lines,
    read_yaml,
    refuse_links,
    remove_leftovers,
    write_text,
    write_yaml,
)


def test_a_planted_link_or_a_kills_leftover_in_the_temporary_files_place_is_not_written_through(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / ".file").symlink_to(victim)
    write_text(tmp_path / "file", "ours")
    assert victim.read_text() == "mine" and (tmp_path / "file").read_text() == "ours"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "victim"]


def test_an_error_leaves_the_file_as_it_was_and_nothing_beside_it(tmp_path, monkeypatch):
    write_text(tmp_path / "file", "before")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_text(tmp_path / "file", "after")
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "before"


def test_a_folder_in_the_place_of_a_journal_is_one_line(tmp_path):
    (tmp_path / "journal").mkdir()
    with pytest.raises(UserError, match="journal: expected a file, found a folder; remove it"):
        read_lines(tmp_path / "journal")


def test_a_journal_ends_at_its_first_damaged_line_whichever_byte_it_is(tmp_path):
    file = tmp_path / "journal"
    entries = [{"batch": n, "score": [n / 3, float("inf")]} for n in range(3)]
    for entry in entries:
        append_line(file, entry)
    whole = file.read_bytes()
    second = whole.index(b"\n") + 1
    for place in range(second, whole.index(b"\n", second) + 1):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert read_lines(file) == entries[:1], place
        append_line(file, entries[1])
        assert read_lines(file) == entries[:2]
    for place in range(second):
        file.write_bytes(whole[:place])
        assert read_lines(file) == [] and not file.read_bytes()


def test_a_line_that_the_disk_has_no_room_for_is_taken_back(tmp_path, monkeypatch):
    file = tmp_path / "journal"
    append_line(file, {"batch": 0})
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space"):
            append_line(file, {"batch": 1})
    append_line(file, {"batch": 1})
    assert read_lines(file) == [{"batch": 0}, {"batch": 1}]


def test_a_yaml_with_any_byte_changed_or_cut_is_refused_or_says_the_same(tmp_path):
    file, content = tmp_path / "run.yaml", {"input": {"path": "a\udcffb"}, "value": 0.25}
    write_yaml(file, content)
    assert read_yaml(file) == content
    whole = file.read_bytes()
    for place in range(len(whole)):
        for damaged in (whole[:place], whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]):
            file.write_bytes(damaged)
            try:
                assert read_yaml(file) == content
            except UserError as error:
                assert "damaged" in str(error) and "\n" not in str(error)


def test_json_of_another_shape_is_refused_by_name(tmp_path):
    for text in ("", "{", "[]", '{"a": "b"}', "\ud800".encode("utf-8", "surrogatepass")):
        (tmp_path / "figures.json").write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(UserError, match=r"figures\.json: damaged"):
            read_json(tmp_path / "figures.json", dict[str, float])
    (tmp_path / "figures.json").write_text(json.dumps({"loss": float("nan"), "steps": 3}))
    assert read_json(tmp_path / "figures.json", dict[str, float])["steps"] == 3


def test_a_link_out_of_the_folder_or_a_pipe_in_it_is_refused_and_one_within_is_not(tmp_path):
    out = tmp_path / "run"
    (out / "trials").mkdir(parents=True)
    (out / "trials" / "latest").symlink_to(out / "trials")
    refuse_links(out)
    (out / "trials" / "model").symlink_to(tmp_path)
    with pytest.raises(UserError, match=r"trials/model: a symbolic link"):
        refuse_links(out)
    (out / "trials" / "model").unlink()
    os.mkfifo(out / "run.yaml")
    with pytest.raises(UserError, match=r"run\.yaml: neither"):
        refuse_links(out)
    (tmp_path / "link").symlink_to(out)
    with pytest.raises(UserError, match="link: a symbolic link"):
        refuse_links(tmp_path / "link")


def test_a_link_that_leads_nowhere_is_refused(tmp_path):
    (tmp_path / "kept.jsonl").symlink_to("kept.jsonl")
    with pytest.raises(UserError, match="leads nowhere"):
        refuse_links(tmp_path)


def test_a_lock_is_held_by_one_at_a_time_also_by_those_that_waited(tmp_path):
    inside, most = [], []

    def take(_):
        with exclusive_lock(tmp_path, wait=True):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.001)
            inside.pop()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(take, range(60)))
    assert most == [1] * 60 and not any(tmp_path.iterdir())
    with exclusive_lock(tmp_path), pytest.raises(UserError, match="another command is writing"):
        exclusive_lock(tmp_path).__enter__()


def test_a_lock_that_a_kill_left_is_removed_and_one_that_is_held_stays(tmp_path):
    with exclusive_lock(tmp_path):
        remove_leftovers(tmp_path)
        assert (tmp_path / ".lock").exists()
    (tmp_path / ".lock").touch()
    (tmp_path / "journal").touch()
    remove_leftovers(tmp_path, "journal")
    remove_leftovers(tmp_path, "journal")
    assert not any(tmp_path.iterdir())
