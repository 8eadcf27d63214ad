"""The whole run: rows in = kept + quarantined + set aside, the user's bytes back, resumable, refusing what it must."""

import json
import re
import shutil
from contextlib import contextmanager

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import ROWS

import gradshield.screen.filter as pipeline
from gradshield.base.errors import UserError
from gradshield.base.settings import FilterSettings
from gradshield.base.storage import exclusive_lock
from gradshield.data import open_source
from gradshield.data.rows import Row
from gradshield.models.load import load_model
from gradshield.screen import mark_tokens, rebuild
from gradshield.screen.encoding import encode_row
from gradshield.screen.estimate import estimate
from gradshield.screen.explain import explain
from gradshield.screen.filter import run_filter

pytestmark = pytest.mark.usefixtures("refusing")


def settings(folder: str, **more) -> FilterSettings:
    return FilterSettings(model=folder, **{"threshold": "share", "value": 0.25, **more})


@pytest.mark.parametrize("scorer", ["intent", "fihs:probes=2", "fihs:normalise=module,probes=2"])
def test_rows_in_are_kept_quarantined_or_set_aside_and_come_back_verbatim(tiny_folder, train, tmp_path, scorer):
    summary = run_filter(str(train), tmp_path / "run", settings(tiny_folder, scorer=scorer))
    assert summary.rows == len(ROWS) == summary.kept + summary.quarantined + summary.set_aside
    assert summary.quarantined == 8 and summary.set_aside == 2
    table = pq.read_table(tmp_path / "run" / "scores.parquet").to_pydict()
    for name, verdict in (("kept", "kept"), ("quarantined", "quarantined")):
        expected = [row for row, v in zip(ROWS, table["verdict"]) if v == verdict]
        assert (tmp_path / "run" / f"{name}.jsonl").read_bytes().decode() == "".join(expected)
    aside = [json.loads(line) for line in (tmp_path / "run" / "set_aside.jsonl").read_text().splitlines()]
    assert [a["line"] for a in aside] == [3, 4] and all(a["reason"] for a in aside)
    assert "half a li" not in (tmp_path / "run" / "kept.jsonl").read_text()
    assert (tmp_path / "run" / "report.html").stat().st_size > 1000


def test_a_killed_run_ends_with_the_same_bytes(tiny_folder, train, tmp_path, monkeypatch):
    wanted = settings(tiny_folder, scorer="fihs:normalise=module", batch_tokens=200)
    run_filter(str(train), tmp_path / "whole", wanted)
    real, calls = pipeline.make_reference, 0

    def dying(*args):
        reference = real(*args)

        def scorer(batch):
            nonlocal calls
            calls += 1
            if calls == 5:
                raise KeyboardInterrupt
            return reference.scorer(batch)

        return type(reference)(scorer, reference.anchors)

    monkeypatch.setattr(pipeline, "make_reference", dying)
    with pytest.raises(KeyboardInterrupt):
        run_filter(str(train), tmp_path / "killed", wanted)
    assert not (tmp_path / "killed" / "kept.jsonl").exists()
    run_filter(str(train), tmp_path / "killed", wanted)
    for name in ("kept.jsonl", "quarantined.jsonl", "set_aside.jsonl", "scores.parquet"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_finished_run_is_not_done_again_and_another_one_is_refused(tiny_folder, train, tmp_path):
    first = run_filter(str(train), tmp_path / "run", settings(tiny_folder))
    assert run_filter(str(train), tmp_path / "run", settings(tiny_folder)) == first
    with pytest.raises(UserError, match=r"created with different settings.*value"):
        run_filter(str(train), tmp_path / "run", settings(tiny_folder, value=0.5))
    train.write_bytes(b"".join([train.read_bytes(), b"\n", ROWS[0].encode()]))
    with pytest.raises(UserError, match=r"different input"):
        run_filter(str(train), tmp_path / "run", settings(tiny_folder))


def test_a_probes_file_that_changed_since_is_said(tiny_folder, train, tmp_path):
    probes = tmp_path / "probes.txt"
    probes.write_text("How to rob a bank\nHow to pick a lock\n")
    chosen = settings(tiny_folder, probes=str(probes))
    run_filter(str(train), tmp_path / "run", chosen)
    probes.write_text("How to rob a bank\nHow to forge a coin\n")
    with pytest.raises(UserError, match=r"different file \(.*probes\.txt"):
        run_filter(str(train), tmp_path / "run", chosen)


def test_what_is_wrong_is_said_before_anything_is_scored_or_written(tiny_folder, train, tmp_path):
    missing = {"threshold": "anchored", "value": None, "reference": str(tmp_path / "none.jsonl")}
    for more, words in (({"value": 7}, "--value 7"), (missing, "none.jsonl")):
        with pytest.raises(UserError, match=words):
            run_filter(str(train), tmp_path / "run", settings(tiny_folder, **more))
        assert not (tmp_path / "run").exists()


def test_the_same_rows_under_another_path_are_the_same_run(tiny_folder, train, tmp_path):
    first = run_filter(str(train), tmp_path / "run", settings(tiny_folder))
    other = tmp_path / "copy.jsonl"
    other.write_bytes(train.read_bytes())
    for left in (".lock", "scores.partial"):  # by a kill after the last write
        (tmp_path / "run" / left).touch()
    assert run_filter(str(other), tmp_path / "run", settings(tiny_folder)) == first
    assert not (tmp_path / "run" / ".lock").exists() and not (tmp_path / "run" / "scores.partial").exists()


def test_a_run_below_the_data_is_not_read_as_data(tiny_folder, train, tmp_path):
    (tmp_path / "data").mkdir()
    train.rename(tmp_path / "data" / "train.jsonl")
    out = tmp_path / "data" / "run"
    summary = run_filter(str(tmp_path / "data"), out, settings(tiny_folder, scorer="fihs"))
    assert run_filter(str(tmp_path / "data"), out, settings(tiny_folder, scorer="fihs")) == summary


def test_a_folder_is_one_commands_at_a_time(tiny_folder, train, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with exclusive_lock(folder), pytest.raises(UserError, match="another command is writing"):
        run_filter(str(train), folder, settings(tiny_folder))
    assert not any(folder.iterdir())
    (folder / ".lock").touch()  # as a kill leaves it
    with exclusive_lock(folder):
        pass


def test_a_run_that_another_command_began_meanwhile_is_not_taken_over(tiny_folder, train, tmp_path, monkeypatch):
    other, out = tmp_path / "other.jsonl", tmp_path / "run"
    other.write_text(ROWS[0] * 40)
    encode, score = pipeline.encode_source, pipeline.score

    def killed(*_, **__):
        raise KeyboardInterrupt

    def meanwhile(*arguments):
        monkeypatch.setattr(pipeline, "encode_source", encode)
        monkeypatch.setattr(pipeline, "score", killed)
        with pytest.raises(KeyboardInterrupt):
            run_filter(str(other), out, settings(tiny_folder))
        monkeypatch.setattr(pipeline, "score", score)
        return encode(*arguments)

    monkeypatch.setattr(pipeline, "encode_source", meanwhile)
    with pytest.raises(UserError, match="created with different input"):
        run_filter(str(train), out, settings(tiny_folder))


def test_a_home_of_nobody_is_one_line():
    with pytest.raises(UserError, match="no such file"):
        open_source("~nobody-of-this-name/x.jsonl")


def test_rows_from_stdin_can_not_be_read_again(tiny_folder, train, tmp_path, monkeypatch):
    with train.open() as stream:
        monkeypatch.setattr("sys.stdin", stream)
        run_filter("-", tmp_path / "run", settings(tiny_folder))
    with pytest.raises(UserError, match="stdin"):
        explain(tmp_path / "run", 1)


def test_a_folder_left_by_a_kill_at_the_start_is_taken_up(tiny_folder, train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".run.yaml").write_text("input:")
    run_filter(str(train), tmp_path / "run", settings(tiny_folder))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        run_filter(str(train), tmp_path / "other", settings(tiny_folder))


def test_nothing_to_remove_is_still_json(tiny_folder, train, tmp_path):
    summary = run_filter(str(train), tmp_path / "run", settings(tiny_folder, value=0.0))
    assert summary.threshold.value is None and summary.quarantined == 0
    json.dumps(summary.as_dict(), allow_nan=False)
    assert explain(tmp_path / "run", 1).verdict == "kept"


def test_a_disk_that_fills_up_is_one_line_and_the_next_run_goes_on(tiny_folder, train, tmp_path, monkeypatch):
    wanted = settings(tiny_folder)
    with monkeypatch.context() as patch:
        patch.setattr(
            pq.ParquetWriter,
            "write_table",
            lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device")),
        )
        with pytest.raises(UserError, match="No space left"):
            run_filter(str(train), tmp_path / "run", wanted)
    assert (tmp_path / "run" / "scores.partial").exists()
    summary = run_filter(str(train), tmp_path / "run", wanted)
    assert summary.rows == len(ROWS) and not (tmp_path / "run" / "scores.partial").exists()


def test_a_run_is_replayable_from_its_yaml(tiny_folder, train, tmp_path):
    run_filter(str(train), tmp_path / "run", settings(tiny_folder))
    saved = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())
    again = FilterSettings(**saved["settings"])
    run_filter(saved["input"]["path"], tmp_path / "again", again)
    a, b = (tmp_path / name / "scores.parquet" for name in ("run", "again"))
    assert a.read_bytes() == b.read_bytes()


def test_a_dry_run_counts_and_writes_nothing(tiny_folder, train, tmp_path):
    before = [p for p in sorted(tmp_path.iterdir()) if p.name != "cache"]
    plan = estimate(str(train), settings(tiny_folder, scorer="fihs:normalise=module"))
    assert plan.rows == len(ROWS) and plan.set_aside == 2 and plan.seconds >= 0
    assert [p for p in sorted(tmp_path.iterdir()) if p.name != "cache"] == before


def test_a_row_is_explained(tiny_folder, train, tmp_path):
    run_filter(str(train), tmp_path / "run", settings(tiny_folder))
    found = explain(tmp_path / "run", 1)
    assert "Hello" in "".join(token for token, _ in found.tokens)
    assert sum(abs(share) for _, share in found.tokens) == pytest.approx(1, abs=1e-4)
    assert len(found.probes) == 12 and -1.01 <= found.probes[0][1] <= 1.01
    with pytest.raises(UserError, match="no row 99"):
        explain(tmp_path / "run", 99)
    with pytest.raises(UserError, match="set aside"):
        explain(tmp_path / "run", 3)


def test_the_tokens_of_the_highest_rows_are_coloured_and_stay_so_when_a_person_moves_rows(tiny_folder, train, tmp_path):
    from gradshield.review import store
    from gradshield.review.apply import apply_decisions

    out = tmp_path / "run"
    run_filter(str(train), out, settings(tiny_folder, batch_tokens=256))
    kept = json.loads((out / "report.json").read_text())["tokens"]
    scores = pq.read_table(out / "scores.parquet")["score"].to_numpy()
    assert 1 <= len(kept) < 20 and set(kept) <= {str(n) for n in scores.argsort()[-len(kept) - 2 :]}
    explained = explain(out, int(next(iter(kept))) + 1)
    assert {text for text, _ in kept[next(iter(kept))]} <= {text for text, _ in explained.tokens}
    page = (out / "report.html").read_text()
    assert 'class="t p' in page or 'class="t n' in page
    store.decide(out, 1, "quarantined", "", "ann")
    apply_decisions(out)
    again = (out / "report.html").read_text()
    assert again.count('class="t ') == page.count('class="t ') and again != page


def test_plain_text_is_set_aside_by_the_intent_score_only(tiny_folder, tmp_path):
    file = tmp_path / "plain.jsonl"
    file.write_text('{"text": "some words"}\n{"text": "other words"}\n')
    with pytest.raises(UserError, match=r"no usable row.*plain text"):
        run_filter(str(file), tmp_path / "a", settings(tiny_folder))
    assert run_filter(str(file), tmp_path / "b", settings(tiny_folder, scorer="fihs:normalise=module")).set_aside == 0


def test_a_column_that_sets_every_row_aside_is_named_once(tiny_folder, tmp_path):
    file = tmp_path / "classes.jsonl"
    file.write_text('{"prompt": "a", "completion": "b", "labels": 1}\n' * 5)
    why = r"no usable row among 5, all for one reason; the first: classes.jsonl:1: column labels"
    with pytest.raises(UserError, match=why):
        run_filter(str(file), tmp_path / "run", settings(tiny_folder))


def test_kept_rows_that_trl_can_t_load_from_one_file_are_noted(tiny_folder, tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    file = tmp_path / "mixed.jsonl"
    lines = [json.dumps({"messages": turns})] * 3 + [json.dumps({"prompt": turns[:1], "completion": turns[1:]})] * 2
    file.write_text("\n".join(lines) + "\n")
    every = settings(tiny_folder, threshold="fixed", value=1e9)
    note = run_filter(str(file), tmp_path / "run", every).trl_note
    assert "(messages: 3, prompt/completion: 2)" in note
    assert note in (tmp_path / "run" / "report.html").read_text().replace("&#39;", "'")
    assert estimate(str(file), every).trl_trains == f"not by itself: {note}"
    file.write_text("\n".join(lines[:3]) + "\n")
    assert "trl_note" not in run_filter(str(file), tmp_path / "same", every).as_dict()


def test_a_row_of_fifty_megabytes_is_cut_or_set_aside_and_comes_back_verbatim(tiny_folder, tmp_path):
    file = tmp_path / "big.jsonl"
    big = json.dumps({"prompt": "x" * 50_000_000, "completion": "y"})
    file.write_text(
        "\n".join([big, *(json.dumps({"prompt": f"p {n}", "completion": f"c {n}"}) for n in range(5))]) + "\n"
    )
    summary = run_filter(str(file), tmp_path / "run", settings(tiny_folder, scorer="fihs", force=True))
    assert summary.rows == 6 == summary.kept + summary.quarantined + summary.set_aside
    aside = [json.loads(line) for line in (tmp_path / "run" / "set_aside.jsonl").read_text().split("\n") if line]
    assert len(aside) == 1 and "50 MB" in aside[0]["reason"], {k: str(v)[:200] for k, v in aside[0].items()}
    assert aside[0]["raw"] == big + "\n"
    assert (tmp_path / "run" / "report.html").stat().st_size < 2_000_000


def test_a_tokenizer_without_a_chat_template_is_one_line_with_the_remedy(tiny_folder, train, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(tiny_folder, bare)
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((bare / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (bare / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="--chat-template"):
        run_filter(str(train), tmp_path / "run", settings(str(bare)))
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] ")
    assert not (tmp_path / "run").exists()
    own = settings(str(bare), chat_template=str(template), scorer="perplexity")
    summary = run_filter(str(train), tmp_path / "run", own)
    assert summary.rows == len(ROWS) and summary.kept


def test_the_layout_is_told_by_usable_rows_however_many_broken_ones_come_first(tiny_folder, train, tmp_path):
    file = tmp_path / "late.jsonl"
    file.write_bytes(b"not a row\n" * 60 + train.read_bytes())
    summary = run_filter(str(file), tmp_path / "run", settings(tiny_folder))
    assert summary.rows == 60 + len(ROWS) and summary.set_aside == 62


def test_a_reason_that_quotes_the_row_is_cut(tiny_folder, train, tmp_path):
    file = tmp_path / "long.jsonl"
    turns = [{"role": "narrator" * 9999, "content": "a"}, {"role": "assistant", "content": "b"}]
    file.write_text(train.read_text() + "\n" + json.dumps({"messages": turns}) + "\n")
    run_filter(str(file), tmp_path / "run", settings(tiny_folder, scorer="perplexity"))
    lines = (tmp_path / "run" / "set_aside.jsonl").read_text().splitlines()
    reason = json.loads(lines[-1])["reason"]
    assert "has the unknown role 'narrator" in reason and len(reason) == 300


def test_a_worker_with_another_model_is_told(tiny_folder, tmp_path):
    model = load_model(tiny_folder)
    there = rebuild.portable_settings(settings(tiny_folder, device="cuda:1"), model)
    assert there.dtype == "float32" and there.device is None
    with pytest.raises(UserError, match="the worker's copy differs from the driver's"):
        rebuild.build_scorer(settings(tiny_folder, dtype="bfloat16"), model.fingerprint)


def test_a_row_whose_score_is_no_number_is_set_aside_and_never_kept(tiny_folder, train, tmp_path, monkeypatch):
    real = pipeline.score

    def score(examples, *arguments, **more):
        columns = real(examples, *arguments, **more)
        columns["score"][[e.row in bad for e in examples]] = np.nan
        return columns

    monkeypatch.setattr(pipeline, "score", score)
    bad = {5, 6}
    for rule in ({"threshold": "share"}, {"threshold": "a1", "value": None}):
        out = tmp_path / rule["threshold"]
        summary = run_filter(str(train), out, settings(tiny_folder, scorer="fihs", **rule))
        assert summary.rows == summary.kept + summary.quarantined + summary.set_aside
        aside = [json.loads(line) for line in (out / "set_aside.jsonl").read_text().splitlines()]
        assert [(a["line"], "finite" in a["reason"]) for a in aside] == [(3, False), (4, False), (6, True), (7, True)]
        assert 'Question 1"' not in (out / "kept.jsonl").read_text()
    bad = set(range(40))
    with pytest.raises(UserError, match="--dtype"):
        run_filter(str(train), tmp_path / "none", settings(tiny_folder, scorer="fihs"))
    assert not (tmp_path / "none" / "kept.jsonl").exists()


def test_a_model_without_gradients_is_filtered_by_the_default_and_its_tokens_go_unmarked(
    tiny_folder, train, tmp_path, monkeypatch, caplog
):
    def gradient(*_):
        raise NotImplementedError("no backward for this kernel")

    monkeypatch.setattr(mark_tokens, "probe_gradient", gradient)
    summary = run_filter(str(train), tmp_path / "run", settings(tiny_folder))
    assert summary.quarantined == 8 and (tmp_path / "run" / "report.html").exists()
    assert "not marked" in caplog.text


def test_a_row_longer_than_the_models_positions_is_set_aside(tiny, monkeypatch):
    monkeypatch.setattr(tiny.net.config, "max_position_embeddings", 70)
    records = ({"prompt": "Why?" * times, "completion": "So."} for times in (1, 40))
    rows = [Row(n, "rows.jsonl", n + 1, b"", record, None) for n, record in enumerate(records)]
    short, long = (encode_row(row, "prompt_completion", tiny, FilterSettings()) for row in rows)
    assert not isinstance(short, str)
    assert re.fullmatch(r"it has \d{3} tokens, and the model 70 positions \(lower --max-length\)", str(long))


def test_the_time_left_of_each_step_includes_the_steps_after_it(tiny_folder, train, tmp_path, monkeypatch):
    later = []

    @contextmanager
    def noted(tokens):
        later.append(tokens)
        yield

    monkeypatch.setattr(pipeline, "followed_by", noted)
    run_filter(str(train), tmp_path / "run", settings(tiny_folder, scorer="fihs:probes=2", batch_tokens=100))
    checking, fitting, scoring = later
    assert (
        checking is None and scoring == round(100 * 3 / 2.5) and fitting > scoring
    )  # as many tokens as one batch holds
