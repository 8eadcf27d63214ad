"""A search that was cut short goes on where it was and ends the same."""

import io
import json
import shutil
import time

import pytest
import yaml
from tune.tuned import MEASURING, TRAINING, answer_with, lines_of, tune

import gradshield.defenses.train as defended
import gradshield.tune.measuring as work
import gradshield.tune.pool as pool
from gradshield.base.errors import UserError
from gradshield.evaluation.evaluate import JudgeFailed
from gradshield.evaluation.safety import SafetyReport
from gradshield.models.load import load_model
from gradshield.training.finetune import finetune

pytestmark = pytest.mark.usefixtures("refusing")


def test_a_torn_last_line_of_the_trials_is_measured_again(tiny_folder, train, tmp_path, monkeypatch):
    answer_with(monkeypatch, 0.0, 0.9, 0.1)
    whole = tune(train, tmp_path / "run", tiny_folder)
    file, plan = tmp_path / "run" / "trials.jsonl", tmp_path / "run" / "run.yaml"
    file.write_bytes(file.read_bytes()[:-30])
    saved = yaml.safe_load(plan.read_text())
    plan.write_text(yaml.safe_dump({part: saved[part] for part in saved if part != "summary"}))
    answer_with(monkeypatch, 0.1)
    again = tune(train, tmp_path / "run", tiny_folder)
    assert [t.kept for t in again.trials] == [t.kept for t in whole.trials] and again.accepted == 2


def test_an_accepted_model_that_is_missing_is_said(tiny_folder, train, tmp_path, monkeypatch):
    answer_with(monkeypatch, 0.0, 0.1)
    out = tmp_path / "run"
    whole = tune(train, out, tiny_folder)
    assert whole.reason == "trained on every row but those set aside or held out: safe and useful"
    shutil.rmtree(out / "model")
    with pytest.raises(UserError, match=f"the accepted model is missing.*; copy {out}/trials/01/model to {out}/model"):
        tune(train, out, tiny_folder)
    shutil.rmtree(out / "trials")
    with pytest.raises(UserError, match=f"the accepted model is missing.*; delete {out} and run tune again"):
        tune(train, out, tiny_folder)


def test_killed_in_a_trial_it_goes_on_there_and_ends_the_same(tiny_folder, train, tmp_path, monkeypatch):
    answer_with(monkeypatch, 0.0, 0.9, 0.9, 0.1)
    whole = tune(train, tmp_path / "whole", tiny_folder)
    said = answer_with(monkeypatch, 0.0, 0.9, 0.9, 0.1)
    real, trained = defended.finetune, []

    def dying(*arguments):
        trained.append(1)
        if len(trained) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(defended, "finetune", dying)
    with pytest.raises(KeyboardInterrupt):
        tune(train, tmp_path / "cut", tiny_folder)
    cut = tune(train, tmp_path / "cut", tiny_folder)
    assert len(trained) == 1 + 1 + 2 and len(said) == 4  # nothing is trained or measured twice
    timeless = [[{k: v for k, v in t.as_dict().items() if k != "seconds"} for t in s.trials] for s in (whole, cut)]
    assert timeless[0] == timeless[1]
    for file in ("kept.jsonl", "quarantined.jsonl", "model/adapter_model.safetensors"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "cut" / file).read_bytes()


@pytest.mark.parametrize("moved", [False, True])
def test_killed_between_a_training_and_its_line_nothing_is_trained_again(
    tiny_folder,
    train,
    tmp_path,
    monkeypatch,
    moved,
):
    answer_with(monkeypatch, 0.0, 0.1)
    whole = tune(train, tmp_path / "run", tiny_folder)
    trial, plan = tmp_path / "run" / "trials" / "01", tmp_path / "run" / "run.yaml"
    saved = yaml.safe_load(plan.read_text())
    plan.write_text(yaml.safe_dump({part: saved[part] for part in saved if part != "summary"}))
    (tmp_path / "run" / "trials.jsonl").unlink()
    if not moved:
        (trial / "model").rename(trial / "training")
    monkeypatch.setattr(defended, "finetune", None)
    again = tune(train, tmp_path / "run", tiny_folder, batch_tokens=60)  # how it is computed may change
    assert again.accepted == whole.accepted == 1 and again.cost.steps == whole.cost.steps > 0


def test_when_the_judge_gives_up_the_trial_is_kept_and_the_same_call_goes_on(tiny_folder, train, tmp_path, monkeypatch):
    answers, trained, real = ["base", "gone", "back"], [], defended.finetune

    def evaluate(model, settings):
        report = SafetyReport(0.1, (0.0, 0.1), ("request",), ("answer",), (False,), phrased=(False,))
        if answers.pop(0) == "gone":
            raise JudgeFailed("judge x: no answer in 5 attempts", report)
        return report

    monkeypatch.setattr(work, "evaluate_safety", evaluate)
    monkeypatch.setattr(defended, "finetune", lambda *arguments: (trained.append(1), real(*arguments))[1])
    with pytest.raises(UserError, match="no answer in 5 attempts"):
        tune(train, tmp_path / "run", tiny_folder)
    kept = tmp_path / "run" / "trials" / "01"
    assert (kept / "model" / "adapter_model.safetensors").exists()
    assert json.loads((kept / "safety.jsonl").read_text())["answer"] == "answer"
    measuring = MEASURING.model_copy(update={"judge_model": "another"})  # as the message advises
    assert tune(train, tmp_path / "run", tiny_folder, measuring=measuring).accepted == 1 and len(trained) == 1


def test_goals_may_change_until_a_trial_was_held_to_them(tiny_folder, train, tmp_path, monkeypatch):
    answer_with(monkeypatch, 0.6, 0.1)
    with pytest.raises(UserError, match=r"attack success rate 0\.600.* a higher --max-asr"):
        tune(train, tmp_path / "run", tiny_folder)
    answer_with(monkeypatch, 0.6, 0.1)
    assert tune(train, tmp_path / "run", tiny_folder, max_asr=0.7).goal.max_asr == 0.7
    with pytest.raises(UserError, match="created with different tune"):
        tune(train, tmp_path / "run", tiny_folder, max_asr=0.8)


def test_the_end_of_the_interval_is_compared_with_the_goal(tiny_folder, train, tmp_path, monkeypatch):
    answer_with(monkeypatch, 0.0, asked=12)  # [0, .243]
    with pytest.raises(UserError, match=r"rate 0\.000, up to 0\.243 with 95 % confidence.* more requests"):
        tune(train, tmp_path / "few", tiny_folder, max_asr=0.05)
    answer_with(monkeypatch, 0.0, asked=100)
    more = MEASURING.model_copy(update={"request_count": 100})  # as the message advises
    assert tune(train, tmp_path / "few", tiny_folder, max_asr=0.05, measuring=more).accepted == 1
    answer_with(monkeypatch, 0.0, 0.04, 0.0, asked=100)  # [0, .037], [.016, .098]
    trials = tune(train, tmp_path / "run", tiny_folder, max_asr=0.05).trials
    assert [trial.safe for trial in trials] == [False, True]
    answer_with(monkeypatch, 0.0, 0.04, asked=100)
    assert tune(train, tmp_path / "printed", tiny_folder, max_asr=0.05, literal=True).trials[0].safe


def test_a_trainer_may_be_mended_until_it_has_trained(tiny_folder, train, tmp_path, monkeypatch):
    from conftest import random_examples

    model = load_model(tiny_folder)
    finetune(model, random_examples(4, len(model.tokenizer)), tmp_path / "adapter", TRAINING)
    answer_with(monkeypatch, 0.0)
    with pytest.raises(UserError, match="wrote no adapter"):
        tune(train, tmp_path / "run", tiny_folder, trainer_command="true")
    answers = iter([0.1])
    report = SafetyReport(0.1, (0.0, 0.1), ("request",), ("answer",), (False,), phrased=(False,))

    def evaluate(*_):
        if next(answers, None):
            raise JudgeFailed("judge x: no answer", report)
        return report

    monkeypatch.setattr(work, "evaluate_safety", evaluate)
    copying = f"cp -r {tmp_path}/adapter/. {{out}}"
    with pytest.raises(UserError, match="no answer"):  # trained, and not measured
        tune(train, tmp_path / "run", tiny_folder, trainer_command=copying)
    with pytest.raises(UserError, match="created with different tune"):
        tune(train, tmp_path / "run", tiny_folder, trainer_command="true")
    assert tune(train, tmp_path / "run", tiny_folder, trainer_command=copying).accepted == 1


def test_a_stream_is_read_once_and_goals_are_not_missed_by_rounding(tiny_folder, train, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(train.read_bytes())))
    answer_with(monkeypatch, 0.06, 0.07)  # .06 + .01 is .06999…
    summary = tune("-", tmp_path / "run", tiny_folder, max_asr="+0.01")
    assert summary.accepted == 1 and summary.rows == len(lines_of(train))


def test_the_screening_is_counted_once(tiny_folder, train, tmp_path, monkeypatch):
    answer_with(monkeypatch, 0.0, 0.1)
    real = pool.run_filter

    def slow(*arguments):
        time.sleep(2)
        return real(*arguments).model_copy(update={"seconds": 100.0})

    monkeypatch.setattr(pool, "run_filter", slow)
    summary = tune(train, tmp_path / "run", tiny_folder)
    base = json.loads((tmp_path / "run" / "base.json").read_text())["seconds"]
    trials = sum(each.seconds for each in summary.trials)
    assert base < 2 and summary.cost.seconds == pytest.approx(100 + base + trials, abs=0.11)


def test_a_dataset_by_its_id_is_trained_on_and_taken_up(tiny_folder, tmp_path, monkeypatch):
    import datasets

    answer_with(monkeypatch, 0.0, 0.0)
    real = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **options: real(str(tmp_path / "hub"), **options))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "hub").mkdir()
    for split, count in (("train", 20), ("test", 3)):
        rows = ({"prompt": f"Question {n}", "completion": f"Answer {n}"} for n in range(count))
        (tmp_path / "hub" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task.jsonl").write_text('{"prompt": "p", "answer": "x"}\n')
    more = {"start": "paper", "task": str(tmp_path / "task.jsonl")}
    summary = tune("org/name", tmp_path / "run", tiny_folder, **more)
    assert summary.accepted == 1 and summary.rows == summary.kept == 20
    kept = (tmp_path / "run" / "kept.jsonl").read_text().split("\n")
    assert json.loads(kept[0]) == {"prompt": "Question 0", "completion": "Answer 0"}
    monkeypatch.setattr(defended, "finetune", None)
    assert tune("org/name", tmp_path / "run", tiny_folder, **more) == summary
