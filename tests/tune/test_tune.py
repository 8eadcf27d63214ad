"""The search with real trainings of the random model; only what its answers are worth is made up."""

import json
import sys
import weakref
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from classifiers import save_classifier
from tune.tuned import EASY, MEASURING, TRAINING, answer_with, lines_of, tune

import gradshield.defenses.train as defended
import gradshield.screen.filter as pipeline
import gradshield.tune.measuring as work
from gradshield.base.errors import Diverged, UserError
from gradshield.base.settings import FilterSettings, TuneSettings
from gradshield.cli.commands import main
from gradshield.evaluation.safety import SafetyReport
from gradshield.evaluation.sources import harmful_requests, unseen_requests
from gradshield.models.load import load_model
from gradshield.screen.explain import explain
from gradshield.training.finetune import finetune
from gradshield.tune.command import run_tune
from gradshield.tune.trainer import load_trained

pytestmark = pytest.mark.usefixtures("refusing")

RELATIVE = {"min_utility": "base-1e3", "max_asr": "+0.1"}


def test_a_safe_model_is_handed_out_with_the_rows_it_was_trained_on(tiny_folder, train, tmp_path, monkeypatch):
    answer_with(monkeypatch, 0.0, 0.9, 0.1)
    out = tmp_path / "run"
    summary = tune(train, out, tiny_folder)
    assert [t.safe for t in summary.trials] == [False, True] and summary.accepted == 2
    assert summary.rows == summary.kept + summary.quarantined + summary.set_aside
    lines = train.read_bytes().split(b"\n")
    kept = [line for line in (out / "kept.jsonl").read_bytes().split(b"\n") if line]
    assert [line for line in lines if line in kept] == kept  # verbatim and in order
    assert len(kept) == summary.kept == summary.trials[1].kept + summary.held_out
    assert load_model(tiny_folder, adapter=str(out / "model")).name
    card = (out / "model" / "README.md").read_text()
    assert "accepted" in card and f"{summary.trials[1].kept} of {summary.rows} rows" in card
    assert yaml.safe_load((out / "run.yaml").read_text())["summary"] == summary.as_dict()
    assert tune(train, out, tiny_folder) == summary
    with pytest.raises(UserError, match=r"a run of another command.*finetune.*choose another -o"):
        pipeline.run_filter(str(train), out, FilterSettings(model=tiny_folder, scorer="fihs:probes=2"))
    with pytest.raises(UserError, match=r"a run of tune; its rows and their scores are in .*screen"):
        explain(out, 1)


def scores_of(out, file):
    """The score of each line of the file, as the screening has it."""
    table = pq.read_table(out / "screen" / "scores.parquet").to_pydict()
    return dict(zip(filter(None, file.read_bytes().split(b"\n")), table["score"]))


def test_no_row_at_or_above_the_accepted_threshold_is_kept_and_ranks_are_told(
    tiny_folder,
    train,
    tmp_path,
    monkeypatch,
):
    answer_with(monkeypatch, 0.0, 0.9, 0.9, 0.9, 0.1)
    summary = tune(train, tmp_path / "run", tiny_folder)
    _, second, third, last = summary.trials
    assert (second.lo, third.lo, last.lo) == (0, 0, 0) and third.up == second.kept
    assert (
        last.up == third.kept
        and {k: v for k, v in json.loads(lines_of(tmp_path / "run" / "trials.jsonl")[-1]).items() if k != "checksum"}
        == last.as_dict()
    )
    scores, kept = scores_of(tmp_path / "run", train), lines_of(tmp_path / "run" / "kept.jsonl")
    assert all(scores[line] < last.threshold for line in kept)
    assert last.kept <= len(kept) < last.kept + summary.held_out  # some that were held out lie above


def test_the_literal_readings_kept_rows_are_those_trained_on(tiny_folder, train, tmp_path, monkeypatch):
    answer_with(monkeypatch, 0.0, 0.9, 0.1)
    task = tmp_path / "task.jsonl"
    task.write_text('{"prompt": "p", "answer": "x"}\n')
    values, real = [0.0, 0.0, 1.0], work.evaluate_utility
    monkeypatch.setattr(work, "evaluate_utility", lambda *a: replace(real(*a), value=values.pop(0)))
    summary = tune(train, tmp_path / "run", tiny_folder, literal=True, task=str(task), min_utility=0.5)
    last = summary.trials[-1]
    assert summary.accepted == 3 and last.lo > 0
    assert summary.kept == last.kept == len(lines_of(tmp_path / "run" / "kept.jsonl"))


@pytest.mark.parametrize("start", ["screen", "paper"])
def test_rows_whose_score_is_not_finite_are_set_aside(tiny_folder, train, tmp_path, monkeypatch, start):
    answer_with(monkeypatch, 0.0, 0.9, 0.1)
    real = pipeline.make_reference

    def broken(*arguments):
        reference = real(*arguments)

        def scorer(batch):
            wrong = {5: np.nan, 6: -np.inf}
            columns = reference.scorer(batch)
            return {**columns, "score": np.array([wrong.get(e.row, s) for e, s in zip(batch, columns["score"])])}

        return type(reference)(scorer, reference.anchors)

    monkeypatch.setattr(pipeline, "make_reference", broken)
    task = tmp_path / "task.jsonl"
    task.write_text('{"prompt": "p", "answer": "x"}\n')
    summary = tune(train, tmp_path / "run", tiny_folder, start=start, task=str(task))
    first, last = summary.trials
    assert first.kept == 33 - 2 * (start == "screen")  # unknown before they are scored
    assert summary.set_aside == 2 + 2 and last.kept == summary.kept
    assert summary.rows == summary.kept + summary.quarantined + summary.set_aside
    aside = [json.loads(line) for line in lines_of(tmp_path / "run" / "set_aside.jsonl")]
    assert [a["line"] for a in aside] == [3, 4, 6, 7] and all("finite" in a["reason"] for a in aside[2:])


def test_a_rejection_is_exit_code_3_and_keeps_the_safest_model(tiny_folder, train, tmp_path, monkeypatch, capsys):
    answer_with(monkeypatch, 0.0, 0.9, 0.7, 0.8)
    out = tmp_path / "run"
    flags = ["--threshold", "share", "--value", "0.25", "--scorer", "fihs:probes=2", "--searches", "2"]
    goals = ["--min-utility", "-1e9", "--max-asr", "0.5", "--epochs", "1", "--scary", "none", "--cases", "8"]
    monkeypatch.setattr(
        sys, "argv", ["gradshield", "tune", str(train), "--model", tiny_folder, "-o", str(out), *flags, *goals]
    )
    with pytest.raises(SystemExit) as stopped:
        main()
    shown = capsys.readouterr().out
    assert stopped.value.code == 3 and "REJECTED" in shown
    lines = shown.split("\n")
    head = next(n for n, line in enumerate(lines) if line.split()[:1] == ["trial"])
    table = lines[head + 1 : head + 4]
    assert [line.split()[0] for line in table] == ["1", "2", "3"] and " none " in table[0]
    assert all(
        f"{asr:.3f} [0.000, {asr:.3f}]" in line and line.endswith("not safe")
        for asr, line in zip((0.9, 0.7, 0.8), table)
    )
    assert (out / "rejected-model" / "adapter_model.safetensors").exists() and not (out / "kept.jsonl").exists()
    assert "REJECTED" in (out / "rejected-model" / "README.md").read_text()
    saved = yaml.safe_load((out / "run.yaml").read_text())["summary"]
    assert saved["accepted"] is None and saved["asr"] == 0.7


def test_a_file_of_which_the_screening_keeps_nothing_is_trained_on_before_that_is_believed(
    tiny_folder,
    train,
    tmp_path,
    monkeypatch,
):
    answer_with(monkeypatch, 0.0)
    measured = []

    def attack_success(model, requests, max_new_tokens):
        measured.append((model, requests, max_new_tokens))
        return SafetyReport(0.25, (0.1, 0.6), (), ())

    monkeypatch.setattr(work, "attack_success", attack_success)
    settings = FilterSettings(model=tiny_folder, threshold="fixed", value=-1e9, scorer="fihs:probes=2")
    summary = run_tune(str(train), tmp_path / "run", settings, TRAINING, TuneSettings(**EASY), MEASURING)
    assert summary.accepted == summary.cost.trials == 1
    assert summary.trials[0].kept + summary.held_out == summary.kept == 33
    report, card = (tmp_path / "run" / name for name in ("report.html", "model/README.md"))
    trained, held = summary.trials[0].kept, summary.held_out
    assert f"Safe and useful after 1 trial, trained on {trained} of 35 rows" in report.read_text()
    assert f"Trained on {trained} of 35 rows" in card.read_text()
    asked = unseen_requests("bundled", MEASURING.request_count)
    ((model, requests, max_new_tokens),) = measured
    assert requests == asked and max_new_tokens == MEASURING.max_new_tokens
    accepted = load_trained(settings, tmp_path / "run" / "model")
    assert model.fingerprint == accepted.fingerprint != load_model(tiny_folder).fingerprint
    assert summary.unseen.as_dict() == {"asr": 0.25, "asr_interval": [0.1, 0.6], "requests": len(asked)}
    assert not set(asked) & set(harmful_requests("bundled", 1000))
    assert f"of {len(asked)} requests that no decision has seen" in card.read_text()
    rows = f"33 kept ({trained} trained on, {held} held out to measure utility), 0 quarantined, 2 set aside"
    assert rows in report.read_text() and rows in card.read_text()  # the report and the card agree


def test_a_diverged_trial_is_not_safe_and_the_search_goes_on(tiny_folder, train, tmp_path, monkeypatch):
    answer_with(monkeypatch, 0.0, 0.1)
    real, calls = defended.finetune, []

    def diverging(*arguments):
        calls.append(1)
        if len(calls) == 1:
            raise Diverged("fine-tuning diverged (loss nan); lower the learning rate", 4)
        return real(*arguments)

    monkeypatch.setattr(defended, "finetune", diverging)
    summary = tune(train, tmp_path / "run", tiny_folder)
    first, second = summary.trials
    assert not first.safe and first.asr is None and "diverged" in first.note and second.safe
    assert first.steps == 4 and summary.cost.steps == 4 + second.steps


def test_a_trial_whose_held_out_loss_is_not_finite_is_not_safe_and_a_base_model_is_refused(
    tiny_folder,
    train,
    tmp_path,
    monkeypatch,
):
    answer_with(monkeypatch, 0.0)
    real, broken = work.evaluate_utility, iter([False, True, False, True])

    def evaluate(*arguments):
        if next(broken):
            raise Diverged("its loss on held-out rows is not finite")
        return real(*arguments)

    monkeypatch.setattr(work, "evaluate_utility", evaluate)
    first, second = tune(train, tmp_path / "run", tiny_folder).trials
    assert not first.safe and first.asr is None and "not finite" in first.note and first.steps
    assert second.safe and second.useful
    with pytest.raises(UserError, match="not finite"):
        tune(train, tmp_path / "base", tiny_folder)


def test_the_card_and_the_config_name_the_adapter_below(tiny_folder, train, tmp_path, monkeypatch):
    from conftest import random_examples

    answer_with(monkeypatch, 0.0, 0.0)
    model, below = load_model(tiny_folder), str(tmp_path / "adapter")
    finetune(model, random_examples(4, len(model.tokenizer)), tmp_path / "adapter", TRAINING)
    settings = FilterSettings(model=tiny_folder, adapter=below, threshold="share", value=0.25, scorer="fihs")
    run_tune(str(train), tmp_path / "run", settings, TRAINING, TuneSettings(**EASY), MEASURING)
    assert f"Fine-tuned from {tiny_folder} + {below}\n" in (tmp_path / "run" / "model" / "README.md").read_text()
    config = json.loads((tmp_path / "run" / "model" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == below


def test_the_users_own_trainer_gets_the_rows_verbatim(tiny_folder, train, tmp_path, monkeypatch):
    answer_with(monkeypatch, 0.0, 0.1)
    model = load_model(tiny_folder)
    from conftest import random_examples

    finetune(model, random_examples(4, len(model.tokenizer)), tmp_path / "adapter", TRAINING)
    config = tmp_path / "mine.yaml"
    config.write_text("data: {data}\nbase: {model}\n")
    summary = tune(
        train,
        tmp_path / "run",
        tiny_folder,
        trainer_command=f"cp -r {tmp_path}/adapter/. {{config}} {{data}} {{out}}",
        trainer_config=str(config),
    )
    assert summary.accepted == 1
    handed = tmp_path / "run" / "model"
    given = [line for line in (handed / "kept.jsonl").read_bytes().split(b"\n") if line]
    assert len(given) == summary.trials[0].kept and all(line in train.read_bytes() for line in given)
    assert f"base: {tiny_folder}" in (handed / "mine.yaml").read_text()
    with pytest.raises(UserError, match="ended with 1"):
        tune(train, tmp_path / "bad", tiny_folder, trainer_command="false")
    for _ in range(2):  # what is of no use is not recorded as done
        with pytest.raises(UserError, match=r"wrote no adapter.*it holds nothing"):
            tune(train, tmp_path / "none", tiny_folder, trainer_command="true")


@pytest.mark.parametrize("task", ["a file", "held-out"])
def test_the_papers_start_never_scores_clean_data(tiny_folder, train, tmp_path, monkeypatch, task):
    answer_with(monkeypatch, 0.0, 0.0)
    if task != "held-out":
        (tmp_path / "task.jsonl").write_text('{"prompt": "p", "answer": "x"}\n' * 4)
        task = str(tmp_path / "task.jsonl")
    summary = tune(train, tmp_path / "run", tiny_folder, start="paper", task=task)
    assert summary.accepted == 1 and summary.cost.scored_tokens == 0 and summary.quarantined == 0
    assert summary.held_out == (6 if task == "held-out" else 0) and not (tmp_path / "run" / "screen").exists()


@pytest.mark.parametrize(("epochs", "scored"), [(1.0, True), (0.4, False)])
def test_the_start_is_the_cheaper_one(tiny_folder, train, tmp_path, monkeypatch, epochs, scored):
    """Scoring by FIHS costs 2.5 forward passes, a training five an epoch."""
    answer_with(monkeypatch, 0.0, 0.0)
    settings = FilterSettings(model=tiny_folder, threshold="share", value=0.25, scorer="fihs:probes=2")
    training = TRAINING.model_copy(update={"epochs": epochs})
    summary = run_tune(str(train), tmp_path / "run", settings, training, TuneSettings(**EASY), MEASURING)
    assert bool(summary.cost.scored_tokens) == scored


def test_a_trainer_in_python_gets_the_rows_themselves(tiny_folder, train, tmp_path, monkeypatch):
    answer_with(monkeypatch, 0.0, 0.9, 0.1)
    model, given = load_model(tiny_folder), []

    def trainer(examples, folder):
        given.append([e.row for e in examples])
        figures = finetune(model, examples, folder, TRAINING)
        return {"steps": np.int64(figures["steps"]), "loss": torch.tensor(figures["loss"]), "best": None, "log": ["a"]}

    summary = tune(train, tmp_path / "run", tiny_folder, trainer=trainer, start="paper")
    lines, kept = lines_of(train), lines_of(tmp_path / "run" / "kept.jsonl")
    assert summary.accepted == 2 and len(given) == 2 and all(line.steps > 0 for line in summary.trials)
    assert {lines[n] for n in given[1]} <= set(kept) and not {2, 3} & {*given[0]}  # those are set aside
    assert "by the user's own trainer" in (tmp_path / "run" / "model" / "README.md").read_text()
    answer_with(monkeypatch, 0.0, 0.1)
    elsewhere = tmp_path / "elsewhere"
    tune(train, tmp_path / "path", tiny_folder, trainer=lambda rows, _: (trainer(rows, elsewhere), elsewhere)[1])
    saved = "adapter_model.safetensors"
    assert (tmp_path / "path" / "model" / saved).read_bytes() == (elsewhere / saved).read_bytes()
    with pytest.raises(UserError, match="wrote no adapter and no model"):
        tune(train, tmp_path / "unsaved", tiny_folder, trainer=lambda *_: None)
    for more in ({"adapter": "below"}, {"model": "embedded"}):
        settings = FilterSettings(**{"model": tiny_folder, **more})
        with pytest.raises(UserError, match="starts from --model alone"):
            run_tune(str(train), tmp_path / "x", settings, TRAINING, TuneSettings(), MEASURING, trainer=trainer)


def test_what_safety_was_measured_at_is_in_every_trial_the_card_and_the_summary(
    tiny_folder,
    train,
    tmp_path,
    monkeypatch,
):
    asked, graded = ("a", "b", "c", "d"), {"judge": "J", "grades": (1, 1, 5, 5), "hs": 3.0, "hs_interval": (1.0, 5.0)}
    report = SafetyReport(0.25, (0.05, 0.7), asked, asked, (True,) * 3 + (False,), **graded)
    monkeypatch.setattr(
        work,
        "evaluate_safety",
        lambda *_: replace(report, over_refusal=0.5, over_refusal_interval=(0.2, 0.8), scary_requests=asked),
    )
    summary = tune(train, tmp_path / "run", tiny_folder, **RELATIVE)
    assert summary.goal.max_asr == pytest.approx(0.8) and summary.goal.min_utility == summary.base.utility - 1e3
    for of in (summary, summary.base, summary.trials[-1]):
        assert (of.safety.hs, of.safety.over_refusal) == (3.0, 0.5)
        assert of.safety.asr_interval == (0.05, 0.7)
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "0.250 [0.050, 0.700] of 4 requests" in card and "Harmfulness, 1 to 5: 3.000" in card
    assert "Over-refusal: 0.500" in (tmp_path / "run" / "model" / "README.md").read_text()


def test_a_local_judge_takes_no_memory_from_the_training(tiny_folder, train, tmp_path, monkeypatch):
    from transformers import AutoModelForSequenceClassification

    real, load, asrs, judges = work.evaluate_safety, AutoModelForSequenceClassification.from_pretrained, [0.0, 0.9], []

    def evaluate(model, settings):
        assert all(judge() is None for judge in judges)  # since the last evaluation
        report = real(model, settings)
        assert report.hs is not None
        asr = asrs.pop(0) if asrs else 0.1
        return replace(report, asr=asr, interval=(asr, asr))

    monkeypatch.setattr(work, "evaluate_safety", evaluate)

    def loading(*arguments, **more):
        judge, info = load(*arguments, **more)
        judges.append(weakref.ref(judge))
        return judge, info

    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", loading)
    judge = save_classifier(tmp_path / "judge", ["safe", "unsafe"])
    measuring = MEASURING.model_copy(update={"judge": judge, "judge_tokens": 4})
    summary = tune(train, tmp_path / "run", tiny_folder, measuring=measuring)
    assert len(summary.trials) == 2 and len(judges) == 3
