"""Whatever is torn or planted in a run folder, a command says so in one line and follows no link."""

import shutil

import pytest
from review.made import chat, make_run, write_jsonl

from gradshield.base.errors import UserError
from gradshield.review.apply import apply_decisions
from gradshield.review.state import Review


def test_what_is_torn_or_planted_in_a_finished_run_is_one_line_for_every_command_and_nothing_is_followed(tmp_path):
    run = make_run(tmp_path / "run", write_jsonl(tmp_path / "a.jsonl", [chat("a", "b"), chat("c", "d")]), [-1.0, 1.0])
    victim = tmp_path / "victim"
    for name in ("run.yaml", "report.json", "scores.parquet"):
        whole = (run / name).read_bytes()
        for torn in (b"", whole[: len(whole) // 2], b"\xff" * 9, b"[]", b"summary: {rows: 2}", b"null"):
            (run / name).write_bytes(torn)
            for command in (apply_decisions, lambda out: Review(out, None, "ann")):
                with pytest.raises(UserError) as error:
                    command(run)
                    raise UserError("not needed: ")  # the page needs no report.json
                assert "\n" not in str(error.value)
        (run / name).unlink()
        victim.write_text("mine")
        (run / name).symlink_to(victim)
        with pytest.raises(UserError, match="symbolic link"):
            apply_decisions(run)
        (run / name).unlink()
        (run / name).write_bytes(whole)
    assert victim.read_text() == "mine"
    apply_decisions(run)


def test_a_link_planted_among_the_outputs_is_not_followed(tmp_path):
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "a.jsonl", [chat("a", "b"), chat("c", "d")])
    run = make_run(tmp_path / "run", tmp_path / "data", [-1.0, 1.0])
    (tmp_path / "elsewhere").mkdir()
    shutil.rmtree(run / "kept")
    (run / "kept").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"kept: a symbolic link"):
        apply_decisions(run)
    assert not any((tmp_path / "elsewhere").iterdir())
