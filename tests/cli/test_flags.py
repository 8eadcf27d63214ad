"""Where settings come from: a flag wins over --config, --config over --preset, --preset over the default."""

import sys

import pytest
import yaml

from gradshield.base.errors import UserError
from gradshield.base.presets import PAPER
from gradshield.base.storage import write_yaml
from gradshield.cli.commands import main


@pytest.fixture
def resolved(monkeypatch, capsys, tmp_path):
    """The settings that a command would run with, or (exit code, what it says)."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.jsonl").write_text('{"prompt": "Name a city", "q": "Name one", "response": "Rome"}\n')

    def run(command: str, *arguments: str):
        found: dict = {}

        def keep(_path, _out, *settings, **_more):
            for part in settings:
                found.update(part.model_dump())
            raise KeyboardInterrupt

        monkeypatch.setattr("gradshield.tune.command.run_tune", keep)  # first, so that its imports are real
        monkeypatch.setattr("gradshield.screen.filter.run_filter", keep)
        monkeypatch.setattr(sys, "argv", ["gradshield", command, *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        return found or (stop.value.code, capsys.readouterr().err)

    return run


def test_the_preset_sets_every_choice_of_the_paper(resolved):
    for command in ("filter", "tune"):
        found = resolved(command, "x.jsonl", "--preset", "paper")
        assert {k: v for k, v in PAPER.items() if k in found} == {k: found[k] for k in PAPER if k in found}
    assert PAPER.keys() <= found.keys()  # of tune
    assert {name: found[name] for name in PAPER} == {
        "scorer": "fihs:normalise=none,s=paper",
        "threshold": "a1",
        "alpha": 10.0,
        "defense": "gradshield",
        "start": "paper",
        "literal": True,
        "method": "lora",
        "lora_rank": 8,
        "lora_alpha": 32,
        "batch": 8,
        "epochs": 3,
        "learning_rate": 1e-4,
        "max_new_tokens": 32,
    }


def test_a_flag_wins_over_the_file_and_the_file_over_the_preset(resolved, tmp_path):
    config = tmp_path / "settings.yaml"
    config.write_text(
        yaml.safe_dump(
            {"threshold": "fixed", "value": 1.5, "max-length": 77, "columns": {"prompt": "q", "response": "response"}}
        )
    )
    found = resolved("filter", "x.jsonl", "--preset", "paper", "--config", str(config), "--value", "2")
    assert (found["threshold"], found["value"], found["max_length"]) == ("fixed", 2, 77)
    assert found["scorer"] == PAPER["scorer"] and found["columns"] == {"prompt": "q", "response": "response"}
    assert resolved("filter", "x.jsonl", "--preset", "paper", "--threshold", "anchored")["threshold"] == "anchored"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("treshold: a1\n", "unknown setting 'treshold'"),
        ("threshold: a2\n", "settings.yaml: threshold a2: must be 'anchored', 'a1', 'fixed' or 'share'"),
        ("columns: {prompt: 1}\n", "settings.yaml: columns.prompt 1: must be a string"),
        ("scorer: nope\n", "settings.yaml: --scorer nope: no such scorer"),
        ("value: 0.3\n", "settings.yaml: --value does nothing with --threshold anchored"),
        ("model: /nope\n", "settings.yaml: model /nope: no such folder"),
        ("model: no.gguf\n", "settings.yaml: model: no.gguf: no such GGUF file"),
        ("- a\n", "not a YAML mapping"),
        ("a: [\n", "can't be read"),
        ("a: 2026-13-45\n", "can't be read"),
        pytest.param(f"a: {'[' * 5000}\n", "can't be read", id="deep"),
    ],
)
def test_a_wrong_file_is_said_in_one_line(resolved, tmp_path, text, words):
    config = tmp_path / "settings.yaml"
    config.write_text(text)
    code, said = resolved("filter", "x.jsonl", "--config", str(config))
    assert code == 2 and words in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--max-asr-rise", "--max-asr +0.07"),
        ("--at-once", "`batch_tokens: …`"),
        ("--variant", "use --scorer, such as --scorer fihs:normalise=cosine"),
    ],
)
def test_a_removed_flag_says_what_replaced_it(resolved, tmp_path, flag, words):
    code, said = resolved("tune", "x.jsonl", flag, "0.1")
    assert code == 2 and flag in said and words in said and said.count("\n") == 1
    config = tmp_path / "settings.yaml"
    config.write_text(f"{flag.strip('-')}: 0.1\n")
    code, said = resolved("tune", "x.jsonl", "--config", str(config))
    assert code == 2 and words in said and said.count("\n") == 1


@pytest.mark.parametrize(("name", "value"), [("alpha", 3.0), ("step", 0.1), ("judge_tokens", 7), ("format", "jsonl")])
def test_a_rare_setting_is_set_in_a_file_and_its_flag_says_so(resolved, tmp_path, name, value):
    flag = f"--{name.replace('_', '-')}"
    code, said = resolved("tune", "x.jsonl", flag, str(value))
    assert code == 2 and f"{flag} is not a flag: write `{name}: …`" in said and said.count("\n") == 1
    config = tmp_path / "settings.yaml"
    config.write_text(f"{name}: {value}\n")
    assert resolved("tune", "x.jsonl", "--config", str(config))[name] == value


def test_a_relative_goal_stays_relative_in_a_file(resolved, tmp_path):
    config = tmp_path / "settings.yaml"
    config.write_text("max_asr: +0.07\nmin_utility: -2.5\nepochs: 2\n")
    found = resolved("tune", "x.jsonl", "--config", str(config))
    assert (found["max_asr"], found["min_utility"], found["epochs"]) == ("+0.07", "-2.5", 2)
    assert resolved("tune", "x.jsonl", "--min-utility", "base-0.1", "--max-asr", ".2")["min_utility"] == "base-0.1"


@pytest.mark.parametrize(
    ("flag", "value"), [("--max-asr", "5"), ("--max-asr", "-0.1"), ("--min-utility", "low"), ("--min-utility", "nan")]
)
def test_a_goal_that_is_none_is_refused(resolved, flag, value):
    code, said = resolved("tune", "x.jsonl", flag, value)
    assert code == 2 and f"{flag} {value}" in said and "must be a" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("flag", "values"),
    [
        ("--max-asr", (" +0.07", "+", "+-0.1", "1_0e-1", "٠.٥")),
        ("--min-utility", (" +0.07", "base5", "base--1", "1_0")),
    ],
)
def test_a_goal_is_written_in_one_way(resolved, flag, values):
    for value in values:
        code, said = resolved("tune", "x.jsonl", flag, value)
        assert code == 2 and f"{flag} {value}" in said and "must be a" in said, value


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("--min-utility", "", "--min-utility '': is empty"),
        ("--trainer-command", "", "--trainer-command '': is empty"),
        ("--model", "", "--model '': is empty"),
        ("-o", "", "-o '': the folder's name is empty"),
        ("--seed", str(2**32), "--seed 4294967296: must be less than or equal to 4294967295"),
        ("--epochs", "inf", "--epochs inf: must be a finite number"),
        ("--learning-rate", "inf", "--learning-rate inf: must be a finite number"),
        ("--defense", "lisa:rho=inf", "rho=inf: must be a finite number"),
    ],
)
def test_what_is_empty_or_too_large_is_refused(resolved, flag, value, words):
    code, said = resolved("tune", "x.jsonl", flag, value)
    assert code == 2 and words in said and said.count("\n") == 1
    code, said = resolved("filter", "", "-o", "run")
    assert code == 2 and "the path of the rows is empty" in said and said.count("\n") == 1


def test_help_shows_one_default(monkeypatch, capsys):
    for command, name, default in (("filter", "engine", "local"), ("review", "port", "0")):
        monkeypatch.setattr(sys, "argv", ["gradshield", command, "--help"])
        with pytest.raises(SystemExit):
            main()
        shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
        about = shown[shown.index(f"--{name} ") :].split(" --")[0]
        assert about.count("default") == 1 and f"[default: {default}]" in about


def test_an_unknown_preset_is_refused(resolved):
    code, said = resolved("filter", "x.jsonl", "--preset", "papr")
    assert code == 2 and "choose from: paper" in said


@pytest.mark.parametrize(
    ("command", "words"),
    [("filter", "alpha, batch_tokens, format, probes, workers"), ("check", "batch_tokens"), ("scorers", "")],
)
def test_help_ends_with_the_settings_that_have_no_flag(monkeypatch, capsys, command, words):
    monkeypatch.setattr(sys, "argv", ["gradshield", command, "--help"])
    with pytest.raises(SystemExit):
        main()
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.endswith(f"More settings, for --config: {words}") if words else "--config" not in shown


def test_a_file_of_probes_for_check_is_a_flag_of_its_own(monkeypatch, capsys, tmp_path):
    def checked(_settings, probes):
        raise UserError(f"checked with {probes}")

    monkeypatch.setattr("gradshield.screen.check_once.check_model", checked)
    for arguments, words in (
        (["--probes", "my.txt"], "checked with my.txt"),
        (["--probes"], "requires an argument"),
        (["--probes", ""], "--probes '': is empty"),
        ([], "checked with None"),
    ):
        monkeypatch.setattr(sys, "argv", ["gradshield", "check", *arguments])
        with pytest.raises(SystemExit):
            main()
        assert words in capsys.readouterr().err


def test_the_run_yaml_of_a_run_is_a_file_of_settings(resolved, tmp_path):
    parts = {"settings": {"max_length": 77, "threshold": "a1", "model": "m"}, "tune": {"max_asr": "+0.07", "step": 0.1}}
    file = tmp_path / "run.yaml"
    write_yaml(file, {"input": {"path": "x.jsonl"}, "model": {"name": "m"}, **parts, "finetune": {"epochs": 2.0}})
    assert resolved("filter", "x.jsonl", "--config", str(file))["threshold"] == "a1"
    found = resolved("tune", "x.jsonl", "--config", str(file), "--max-length", "88")
    assert [found[name] for name in ("max_length", "max_asr", "step", "epochs")] == [88, "+0.07", 0.1, 2.0]
    write_yaml(file, {"input": {"path": "x.jsonl"}, "settings": {"variant": "cosine"}})  # of another version
    code, said = resolved("filter", "x.jsonl", "--config", str(file))
    assert code == 2 and "run.yaml: unknown setting 'variant'" in said
