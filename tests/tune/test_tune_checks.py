"""What `tune` says before it trains: goals that can't be met, settings that don't go together, files that changed."""

import pytest
from tune.tuned import EASY, MEASURING, TRAINING, answer_with, tune

import gradshield.defenses.train as defended
import gradshield.tune.command as room
import gradshield.tune.measuring as work
from gradshield.base.errors import UserError
from gradshield.base.settings import FilterSettings, FinetuneSettings, TuneSettings
from gradshield.models.load import load_model
from gradshield.training.finetune import finetune
from gradshield.tune.command import run_tune

pytestmark = pytest.mark.usefixtures("refusing")


def test_a_named_file_that_changed_since_is_said(tiny_folder, train, tmp_path, monkeypatch):
    answer_with(monkeypatch, 0.0, 0.0)
    task, asked = tmp_path / "task.jsonl", tmp_path / "requests.txt"
    task.write_text('{"prompt": "p", "answer": "x"}\n')
    asked.write_text("one\n")
    measuring = MEASURING.model_copy(update={"requests": str(asked)})
    summary = tune(train, tmp_path / "run", tiny_folder, start="paper", task=str(task), measuring=measuring)
    for file in (task, asked):
        before = file.read_text()
        file.write_text(before + before)
        with pytest.raises(UserError, match=f"different file .*{file.name}"):
            tune(train, tmp_path / "run", tiny_folder, start="paper", task=str(task), measuring=measuring)
        file.write_text(before)
    assert tune(train, tmp_path / "run", tiny_folder, start="paper", task=str(task), measuring=measuring) == summary


def test_a_base_model_that_misses_the_goal_is_said_before_training(tiny_folder, train, tmp_path, monkeypatch):
    answer_with(monkeypatch, 0.6)
    monkeypatch.setattr(defended, "finetune", None)
    with pytest.raises(UserError, match=r"0\.600.* before any fine-tuning"):
        tune(train, tmp_path / "run", tiny_folder)


def test_too_few_rows_to_hold_any_out_are_said(tiny_folder, train, tmp_path, monkeypatch):
    answer_with(monkeypatch, 0.0)
    train.write_text("".join(line for line in train.read_text().splitlines(keepends=True)[4:9]))
    for start, words in (("screen", "the screening keeps too few rows"), ("paper", "the file has too few rows")):
        if start == "paper":
            train.write_text("".join(train.read_text().splitlines(keepends=True)[:4]))
        with pytest.raises(UserError, match=f"{words} to hold any out .*: name a --task"):
            tune(train, tmp_path / start, tiny_folder, start=start)


def test_what_quantised_weights_can_not_be_trained_with_is_said_before_anything_is_measured(
    tiny_folder,
    train,
    tmp_path,
    monkeypatch,
):
    pytest.importorskip("bitsandbytes")
    from conftest import random_examples

    monkeypatch.setattr(work, "evaluate_safety", None)
    model = load_model(tiny_folder)
    finetune(model, random_examples(4, len(model.tokenizer)), tmp_path / "adapter", TRAINING)
    for more, training, words in (
        ({"adapter": str(tmp_path / "adapter")}, {}, "second adapter over quantised weights.*--quantize"),
        ({"model": str(tmp_path / "adapter")}, {}, "second adapter over quantised weights.*--quantize"),
        ({}, {"method": "full"}, "--method full"),
    ):
        settings = FilterSettings(**{"model": tiny_folder, "quantize": "4bit", **more})
        parts = FinetuneSettings(**training), TuneSettings(**EASY), MEASURING
        with pytest.raises(UserError, match=words):
            run_tune(str(train), tmp_path / "run", settings, *parts)
    assert not (tmp_path / "run").exists()


def test_what_is_wrong_with_the_evaluation_is_said_before_a_model_is_loaded(train, tmp_path, monkeypatch):
    def load(*_):
        raise AssertionError("loaded")

    monkeypatch.setattr(room, "load_settings_model", load)
    task = tmp_path / "task.jsonl"
    task.write_text('{"question": "a", "reply": "b"}\n')
    half = tmp_path / "half.jsonl"
    half.write_text('{"prompt": "\\ud800"}\n')
    for more, words in (
        ({"task": str(task)}, "question, reply"),
        ({"task": "agnwes"}, "agnwes: none of samsum.*not a task of lm-eval"),
        ({"measuring": MEASURING.model_copy(update={"requests": "advbenhc"})}, "advbenhc"),
        ({"measuring": MEASURING.model_copy(update={"scary": "no.txt"})}, r"no\.txt"),
        ({"measuring": MEASURING.model_copy(update={"requests": str(half)})}, r"half\.jsonl:1: lone surrogate"),
    ):
        with pytest.raises(UserError, match=words):
            tune(train, tmp_path / "run", "no model", **more)
    assert not (tmp_path / "run").exists()


def test_a_gpu_that_the_trainer_does_not_take_is_said_before_a_model_is_loaded(train, tmp_path):
    settings = FilterSettings(model="no model", device="cuda:1")
    with pytest.raises(UserError, match="set CUDA_VISIBLE_DEVICES=1"):
        run_tune(train, tmp_path / "run", settings, TRAINING, TuneSettings(**EASY), MEASURING)


def test_what_a_trainers_command_can_not_be_filled_with_is_said(tiny_folder, train, tmp_path, monkeypatch):
    answer_with(monkeypatch, 0.0, 0.1)
    for n, (more, words) in enumerate(
        (
            ({"trainer_command": "train {dataset}"}, "dataset.*placeholders are {data}, {out}, {model}, {seed}"),
            ({"trainer_command": "train {data"}, "can't be filled in"),
            ({"trainer_command": "train {data.name.x}"}, "can't be filled in"),
            ({"trainer_command": "  "}, "is empty"),
            ({"trainer_config": __file__}, "does nothing without --trainer-command"),
            ({"trainer_command": "train {data}", "trainer_config": __file__}, "it has no {config} placeholder"),
            ({"trainer_command": "train {config}", "trainer_config": "no.yaml"}, r"--trainer-config no\.yaml"),
        )
    ):
        with pytest.raises(UserError, match=words):
            tune(train, tmp_path / str(n), tiny_folder, **more)


def test_what_does_not_go_with_several_processes_is_said(train, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    for settings, training, tuning, words in (
        ({}, {}, {}, "--batch 8 is not divisible by 3"),
        ({"model": "a folder"}, {"batch": 9}, {"trainer_command": "true"}, "without a launcher"),
        ({"device": "auto"}, {"batch": 9}, {}, "--device auto"),
    ):
        parts = FilterSettings(**settings), FinetuneSettings(**training), TuneSettings(**tuning), MEASURING, None
        with pytest.raises(UserError, match=words):
            room._check(*parts)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="FSDP is not supported"):
        room._check(FilterSettings(), FinetuneSettings(batch=9), TuneSettings(), MEASURING, None)
