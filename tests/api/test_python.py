"""Rows come from anywhere and a run comes back; the page about it runs as it is written."""

import datetime
import json
import pydoc
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROWS
from datasets import Dataset, DatasetDict

import gradshield
from gradshield import FilterSettings, Run, UserError, check, evaluate, explain, screen, tune
from gradshield.api.functions import _chosen
from gradshield.base.presets import PAPER, preset_values

pytestmark = pytest.mark.usefixtures("refusing")
RECORDS = [json.loads(line) for line in ROWS[:2] + ROWS[4:]]
QUICK = {"scorer": "fihs:probes=2", "threshold": "share", "value": 0.25}
PAGE = Path(__file__).parents[2] / "docs" / "python.md"


@pytest.fixture
def quick(tiny_folder):
    return FilterSettings(model=tiny_folder, **QUICK)


def test_a_path_a_dataset_a_frame_and_a_list_give_the_same_run(quick, tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    given = {
        "text": str(file),
        "path": file,
        "list": RECORDS,
        "generator": (record for record in RECORDS),
        "frame": pd.DataFrame(RECORDS),
        "dataset": Dataset.from_list(RECORDS),
    }
    runs = {name: screen(rows, quick, out=tmp_path / name) for name, rows in given.items()}
    for name, run in runs.items():
        assert run.kept == runs["text"].kept and run.quarantined == runs["text"].quarantined, name
        assert run.scores.score.tolist() == runs["text"].scores.score.tolist(), name
    first = runs["list"]
    assert len(first.kept) + len(first.quarantined) == len(RECORDS) and first.set_aside == []
    assert first.kept + first.quarantined != RECORDS and {str(r) for r in first.kept} < {str(r) for r in RECORDS}
    assert explain(first, 1).row == 1  # the rows are still there


def test_a_frame_with_a_column_twice_is_refused(quick, tmp_path):
    frame = pd.DataFrame([["q", "a", "b"]], columns=["prompt", "completion", "completion"])
    with pytest.raises(UserError, match="rows: column 'completion' appears twice; rename one of them"):
        screen(frame, quick, out=tmp_path / "run")


def test_a_run_is_a_table_and_is_opened_again(quick, tmp_path, train):
    run = screen(train, quick, out=tmp_path / "run")
    shown = repr(run).splitlines()
    assert shown[0] == f"Run('{tmp_path}/run')"
    assert re.match(r"  kept +25  .*run/kept\.jsonl", shown[2]) and re.match(r"  set aside +2  ", shown[4])
    assert {"kept", "quarantined", "set_aside", "scores", "report", "train"} == run.paths.keys()
    again = Run(tmp_path / "run")
    assert again.kept == run.kept and again.set_aside[0]["line"] == 3 and again.summary == run.summary
    assert list(again.scores.verdict).count("kept") == len(again.kept) == 25
    with pytest.raises(UserError, match=r"not a run folder"):
        Run(tmp_path)


def test_other_rows_are_refused_and_the_same_ones_return_at_once(quick, tmp_path, monkeypatch):
    run = screen(RECORDS, quick, out=tmp_path / "run")
    before = {path.name: path.read_bytes() for path in run.folder.iterdir()}
    with pytest.raises(UserError, match="a run of other rows"):
        screen(RECORDS[:-1], quick, out=tmp_path / "run")
    monkeypatch.setattr("gradshield.screen.filter.score", None)  # nothing is scored again
    assert screen(RECORDS, quick, out=tmp_path / "run").kept == run.kept
    assert before == {path.name: path.read_bytes() for path in run.folder.iterdir()}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("")
    with pytest.raises(UserError, match="not empty and not a run"):
        screen(RECORDS, quick, out=tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (["text"], r"rows\[0\] is a str; each row must be a dict"),
        ([], "rows: there are none; give at least one row"),
        ([{"prompt": "a", "completion": "b"}, {"prompt": object()}], r"rows\[1\] can't be written as JSON"),
        (5, "rows: int is not accepted; give a path"),
        (DatasetDict({"train": Dataset.from_list(RECORDS)}), "give one of its values"),
    ],
)
def test_rows_that_are_none_are_named_and_leave_nothing(quick, tmp_path, rows, says):
    with pytest.raises(UserError, match=says):
        screen(rows, quick, out=tmp_path / "run")
    assert not list(tmp_path.glob("run/*"))


def test_rows_in_memory_are_held_out_rows_of_an_evaluation(quick, tmp_path):
    given = {"out": tmp_path / "eval", "safety": False, "rows": RECORDS, "model": quick.model}
    first = evaluate(**given)
    assert first.utility and first.utility.n == len(RECORDS) and evaluate(**given) == first
    with pytest.raises(UserError, match="holds a run of other rows"):
        evaluate(**given | {"rows": RECORDS[:2]})


def test_dates_arrays_missing_values_and_odd_text_reach_the_run(quick, tmp_path):
    turns = np.array([{"role": "user", "content": "a"}, {"role": "assistant", "content": "Grüße"}])
    frame = pd.DataFrame({"messages": [turns] * 4, "day": [datetime.date(2024, 5, 1)] * 3 + [None], "n": [1, 2, 3, 4]})
    run = screen(frame, quick, out=tmp_path / "run")
    rows = run.kept + run.quarantined
    assert [sorted(row) for row in rows] == [["day", "messages", "n"]] * 4
    assert {row["day"] for row in rows} == {"2024-05-01", None} and rows[0]["messages"][1]["content"] == "Grüße"
    odd = screen([*RECORDS, {"prompt": "half \ud83d", "completion": "x"}], quick, out=tmp_path / "odd")
    assert len(odd.set_aside) == 1 and "surrogate" in odd.set_aside[0]["reason"]


def test_a_wrong_setting_is_named_before_anything_is_written(quick, tmp_path):
    for named, says in (
        ({"modle": "x"}, "unknown setting 'modle'; did you mean 'model'"),
        ({"presett": "paper"}, "unknown setting 'presett'; did you mean 'preset'"),
        ({"max_length": 0}, "max_length=0: must be greater than or equal to 2"),
    ):
        with pytest.raises(UserError, match=says):
            screen(RECORDS, out=tmp_path / "run", **named)
    with pytest.raises(UserError, match="EvaluationSettings is not accepted here; pass FilterSettings"):
        screen(RECORDS, gradshield.EvaluationSettings(), out=tmp_path / "run")  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()
    found = check(quick.model)
    assert found.model == quick.model  # a name in the place of settings
    assert len(repr(found)) < 500 and found.per_probe[0].probe not in repr(found)  # one line, without the answers


def test_what_is_given_twice_or_of_a_wrong_type_is_said(quick, tmp_path):
    for call, says in (
        (lambda: screen(RECORDS, quick, FilterSettings(), out=tmp_path / "run"), "FilterSettings is given twice"),
        (lambda: screen(RECORDS, "a model", "another", out=tmp_path / "run"), "model is given twice"),
        (lambda: screen(RECORDS, quick, out=5), "out=5: give the path of a folder"),  # type: ignore[arg-type]
        (lambda: screen(RECORDS, quick, out=""), "out='': give the path of a folder"),
        (lambda: screen(RECORDS, quick, preset=["paper"]), "no such preset"),  # type: ignore[arg-type]
        (lambda: tune(RECORDS, quick, train_with="x"), "train_with='x': give a function"),  # type: ignore[arg-type]
        (lambda: tune(RECORDS, quick, on_trial=None), "on_trial=None: give a function"),  # type: ignore[arg-type]
        (lambda: evaluate(quick.model, task=3, out=tmp_path / "run"), "task=3: give the name"),  # type: ignore[arg-type]
        (lambda: evaluate(quick.model, tsak="x"), "unknown setting 'tsak'; see help.EvaluationSettings"),
        (lambda: check(quick.model, probes=["a"]), r"probes=\['a'\]: give a file"),  # type: ignore[arg-type]
        (lambda: check(quick.model, probes=tmp_path / "no.txt"), "no.txt: no such file"),
        (lambda: explain(tmp_path, "1"), "row='1': give the number of a row"),  # type: ignore[arg-type]
        (lambda: explain(tmp_path, True), "row=True: give the number of a row"),
        (lambda: Run(None), r"Run\(None\): give the path of a run folder"),  # type: ignore[arg-type]
    ):
        with pytest.raises(UserError, match=says):
            call()
    assert not (tmp_path / "run").exists()


def test_rows_are_read_from_another_working_directory_and_a_missing_file_is_said(quick, tmp_path, train, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = screen(train, quick, out="run")
    monkeypatch.chdir("/")
    assert len(run.kept) == 25
    (tmp_path / "run" / "quarantined.jsonl").unlink()
    with pytest.raises(UserError, match="the file of the rows that are quarantined is missing; delete the folder"):
        _ = run.quarantined


def test_a_name_wins_over_settings_and_every_other_field_stays():
    given = FilterSettings(engine="ray", workers=2, max_length=99)
    (chosen,) = _chosen((FilterSettings,), (given, "a model"), {"max_length": 7})
    assert chosen == FilterSettings(engine="ray", workers=2, max_length=7, model="a model")


def test_a_preset_gives_way_to_settings_and_to_names():
    given = FilterSettings(threshold="share", value=0.2)
    (chosen,) = _chosen((FilterSettings,), (given,), {"max_length": 7}, preset_values("paper"))
    assert chosen == FilterSettings(scorer=PAPER["scorer"], threshold="share", value=0.2, max_length=7)
    with pytest.raises(UserError, match="preset 'papr': no such preset; choose from: paper"):
        screen(RECORDS, preset="papr")


def test_the_names_are_few_described_and_light():
    code = (
        "import sys, gradshield\n"
        "names = dir(gradshield)\n"
        "from gradshield import screen, tune, evaluate, check, explain, Run, FilterSettings, UserError\n"
        "assert callable(screen) and callable(tune), 'a room that can not be called'\n"
        "heavy = {'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "from gradshield import *\n"
        "print(' '.join(names), gradshield.__version__)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert not found.returncode, found.stderr
    assert found.stdout.split()[:-1] == sorted(gradshield.__all__)
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", found.stdout.split()[-1])
    assert (Path(gradshield.__file__).parent / "py.typed").is_file()  # type checkers read the annotations
    for name in gradshield.__all__:
        each = getattr(gradshield, name)
        if name.endswith("Settings"):
            assert not [field for field, about in each.model_fields.items() if not about.description], name
        assert name == "__version__" or each.__doc__, name


def test_help_shows_arguments_and_every_setting():
    shown = pydoc.plaintext.document(gradshield.screen)
    assert repr(gradshield.screen) == "<function gradshield.screen(rows, …)>"
    assert (
        "screen(rows, *settings, out='run', preset=None, **named)" in shown
        and "returns a finished one immediately" in shown
    )
    for settings in (gradshield.FilterSettings, gradshield.EvaluationSettings):
        shown = pydoc.plaintext.document(settings)
        for name, field in settings.model_fields.items():
            assert f"{name} (default {field.default!r}): {field.description}" in shown


def test_the_page_runs_as_it_is_written(tiny_folder, tmp_path, train, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ", ".join(f"{name}={value!r}" for name, value in QUICK.items())
    few = "request_count=4, max_new_tokens=4, scary='none'"
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        for call, more in (
            (r"(?:screen|FilterSettings)\(", small),
            (r"tune\(", f"{small}, {few}, cases=8, epochs=1, min_utility=-1e9"),
            (r"evaluate\(", few),
        ):
            block = re.sub(rf'({call}[^()]*model="Qwen/[^"]*")', rf"\1, {more}", block)
        block = block.replace('max_asr="+0.07"', "max_asr=1.0")  # the random model complies with everything
        exec(block.replace("Qwen/Qwen2.5-7B-Instruct", tiny_folder), scope := {})
    assert Run("run-of-rows").paths["kept"] == tmp_path / "run-of-rows/kept.jsonl"
    assert scope["run"].summary.accepted == 1 and 0 <= scope["figures"].safety.asr <= 1
