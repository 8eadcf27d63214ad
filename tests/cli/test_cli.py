"""A user's mistake is one line on stderr and exit code 2, before a model is loaded; --help is quick and light."""

import subprocess
import sys
from pathlib import Path

import pytest
from review.made import chat, make_run, write_jsonl
from rich.console import Console

from gradshield.base.storage import append_line
from gradshield.cli import commands as cli
from gradshield.cli import terminal
from gradshield.data.run_folder import read_run, run_lock
from gradshield.data.summaries import FilterSummary, ProbesSummary, ThresholdSummary
from gradshield.defenses.registry import DEFENSES
from gradshield.scoring.registry import SCORERS
from gradshield.screen.check_once import CheckSummary


def run(monkeypatch, capsys, *arguments: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["gradshield", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0), capsys.readouterr().err


BAD_FILES = {
    "empty.jsonl": b"",
    "noise.bin": bytes(range(256)),
    "half.jsonl": b'{"prompt": "a", "comp\n',
    "latin.jsonl": b'{"prompt": "caf\xe9", "completion": "x"}\n',
    "odd.jsonl": b'{"colour": "red", "size": 3}\n',
    "broken.json": b'[{"prompt": "a", "completion": "b"},',
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_input_is_one_line_that_names_the_file(monkeypatch, capsys, tmp_path, name):
    file = tmp_path / name
    file.write_bytes(BAD_FILES[name])
    code, error = run(monkeypatch, capsys, "filter", str(file), "-o", str(tmp_path / "run"))
    assert code == 2 and error.count("\n") == 1 and name in error
    assert not (tmp_path / "run").exists()


def test_a_missing_file_folder_and_model_are_named(monkeypatch, capsys, tmp_path):
    good = tmp_path / "good.jsonl"
    good.write_text('{"prompt": "a", "completion": "b"}\n')
    empty = tmp_path / "empty"
    empty.mkdir()
    for arguments, word in (
        (("filter", str(tmp_path / "no.jsonl")), "no.jsonl"),
        (("filter", str(empty)), "empty"),
        (("filter", str(good), "--model", str(empty)), "config.json"),
        (("filter", str(good), "--model", "./nowhere"), "no such folder"),
        (("filter", str(good), "--device", "warp"), "--device warp"),
        (("filter", str(good), "--loss-on", "all"), "--loss-on all"),
        (("filter", str(good), "--threshold", "fixed"), "--value"),
        (("filter", str(good), "--threshold", "fixed", "--value", "nan"), "--value"),
        (("filter", str(good), "-o", str(good / "run")), "run"),
        (("filter", str(good), "-o", str(tmp_path / ("x" * 300))), "xxx"),
        (("filter", str(good), "--scorer", "magic"), "--scorer magic: no such scorer"),
        (("filter", str(good), "--map", "prompt"), "--map"),
        (("filter", str(good), "--map", "prompt=wrong", "--map", "response=completion"), "wrong"),
        (("explain", str(empty), "1"), "run.yaml"),
    ):
        code, error = run(monkeypatch, capsys, *arguments)
        assert code == 2 and error.count("\n") == 1 and word in error, (arguments, error)


def test_a_model_folder_without_safetensors_is_refused(monkeypatch, capsys, tmp_path):
    good = tmp_path / "good.jsonl"
    good.write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    code, error = run(monkeypatch, capsys, "filter", str(good), "--model", str(tmp_path))
    assert code == 2 and "pickled" in error


def test_a_random_model_is_not_aligned(monkeypatch, capsys, tiny_folder):
    code, error = run(monkeypatch, capsys, "check", "--model", tiny_folder)
    assert code == 2 and "not aligned" in error


def test_hostile_text_shows_no_control_characters():
    shown = terminal.safe("\x1b[31mred\u202e\u200b[bold]x", 100)
    assert "\x1b" not in shown and "\u202e" not in shown and "\u200b" not in shown and "\\[bold]" in shown


def test_the_name_of_a_folder_writes_no_escape_to_the_terminal(monkeypatch, capsys, tmp_path):
    name = "run\x1b]0;title\x07\u202e[red]"
    out = make_run(tmp_path / name, write_jsonl(tmp_path / "train.jsonl", [chat("a", "b")]), [0.0])
    terminal.show({"kept": 1}, False, f"files in {out}")
    terminal.summary_table(read_run(out).summary, out)
    said = capsys.readouterr().out
    assert "[red]" in said and not [c for c in said if c != "\n" and not c.isprintable()]


def test_import_and_help_need_no_torch():
    code = (
        "import sys; sys.argv = ['gradshield', '--help']\n"
        "import gradshield, gradshield.data, gradshield.cli.commands\n"
        "try: gradshield.cli.commands.main()\nexcept SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=Path(__file__).parent)


def test_json_knows_no_infinity(capsys):
    terminal.print_json({"threshold": float("inf"), "score": [1.0, float("nan")]})
    assert capsys.readouterr().out == '{"threshold": null, "score": [1.0, null]}\n'


def test_the_version_is_said_and_what_would_do_nothing_is_refused_before_a_model_is_loaded(
    monkeypatch, capsys, tmp_path
):
    good = tmp_path / "good.jsonl"
    good.write_text('{"prompt": "a", "completion": "b"}\n')
    (config := tmp_path / "probes.yaml").write_text("probes: nope\n")
    assert run(monkeypatch, capsys, "--version")[0] == 0
    for flags, words in (
        (["--value", "3"], "--value does nothing with --threshold anchored"),
        (["--threshold", "share", "--value", "3"], "a share must be between 0 and 1"),
        (["--scorer", "intent:contrast=minus"], "--scorer intent: no option 'contrast'; it has none"),
        (["--scorer", "fihs:normalise=maybe"], "normalise=maybe: must be 'none', 'cosine' or 'module'"),
        (["--config", str(config)], "probes nope: no such file"),
    ):
        code, said = run(monkeypatch, capsys, "filter", str(good), *flags)
        assert code == 2 and words in said


def test_a_model_of_the_hub_that_is_not_there_says_what_to_do(monkeypatch, capsys):
    code, said = run(monkeypatch, capsys, "check", "--model", "no-one/such")
    assert code == 2 and "name a local folder" in said


def test_ctrl_c_says_what_is_saved_and_how_to_resume(monkeypatch, capsys, tmp_path):
    def stopped(*_):
        with run_lock(tmp_path):
            append_line(tmp_path / "scores.partial", {"batch": 0, "of": 2})
            raise KeyboardInterrupt

    (tmp_path / "a b.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gradshield.screen.filter.run_filter", stopped)
    code, said = run(monkeypatch, capsys, "filter", "a b.jsonl", "-o", str(tmp_path))
    assert code == 130 and said.count("\n") == 1
    assert (
        f"{tmp_path} keeps batches of scores: 1" in said
        and f"resume: gradshield filter 'a b.jsonl' -o {tmp_path}" in said
    )
    monkeypatch.setattr(
        "gradshield.models.load.load_settings_model", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    code, said = run(monkeypatch, capsys, "check")
    assert code == 130 and "nothing was saved yet" in said


@pytest.mark.parametrize("name", ["run\x1b[31m", "run\nnext", "run\u202e", "run\udcff"])
def test_a_folder_whose_name_could_write_to_the_terminal_is_refused(monkeypatch, capsys, tmp_path, name):
    good = tmp_path / "good.jsonl"
    good.write_text('{"prompt": "a", "completion": "b"}\n')
    out = tmp_path / name
    for command in (("filter", str(good)), ("tune", str(good)), ("eval", "--safety"), ("align",), ("demo",)):
        code, said = run(monkeypatch, capsys, *command, "-o", str(out))
        assert code == 2 and said.count("\n") == 1 and "invisible characters" in said, command
    assert [p.name for p in tmp_path.iterdir()] == ["good.jsonl"]


@pytest.mark.parametrize("module", ["gradshield.cli.commands", "typer", "pydantic"])
def test_ctrl_c_while_python_imports_is_one_line(module):
    stopping = f"""
import sys
class Stop:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            raise KeyboardInterrupt
sys.meta_path.insert(0, Stop())
from gradshield.cli import main
"""
    done = subprocess.run([sys.executable, "-c", stopping], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "gradshield: stopped: nothing was saved yet\n")


def test_ctrl_c_before_a_command_is_called_is_one_line(monkeypatch, capsys):
    def stop():
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "processes", stop)
    assert run(monkeypatch, capsys, "scorers") == (130, "gradshield: stopped: nothing was saved yet\n")


SUMMARY = FilterSummary(
    file="train.jsonl", model="m", scorer="intent", rows=300, kept=279, quarantined=21, set_aside=0,
    threshold=ThresholdSummary(
        value=1.0, rule="anchored", note="[bold]clear", clear=True, good_lost=0.4, harmful_kept=1.26
    ),
    probes=ProbesSummary(refused=18, of=20, grade="aligned"),
    seconds=2.0, rows_per_second=150.0, tokens_per_second=9000, version="0.1.0",
)  # fmt: skip


@pytest.mark.parametrize(("limit", "code"), [("20", 1), ("21", 0), ("0", 1)])
def test_fail_above_ends_a_pipeline_when_more_rows_are_quarantined(monkeypatch, capsys, tmp_path, limit, code):
    monkeypatch.setattr("gradshield.screen.filter_once.filter_file", lambda *_: SUMMARY)
    found, error = run(monkeypatch, capsys, "filter", "train.jsonl", "-o", str(tmp_path), "--fail-above", limit)
    assert found == code
    assert error == (f"gradshield: 21 rows quarantined, more than the {limit} of --fail-above\n" if code else "")


def test_filter_ends_with_commands_to_copy(monkeypatch, capsys, tmp_path):
    noted = SUMMARY.model_copy(update={"trl_note": "the rows differ in layout"})
    monkeypatch.setattr("gradshield.screen.filter_once.filter_file", lambda *_: noted)
    out = tmp_path / "my run"
    out.mkdir()
    for name in ("kept.jsonl", "train.py"):
        (out / name).write_text("")
    monkeypatch.setattr(sys, "argv", ["gradshield", "filter", "train.jsonl", "-o", str(out)])
    with pytest.raises(SystemExit):
        cli.main()
    shown = capsys.readouterr().out
    assert f"python '{out}/train.py'" in shown and f"gradshield review '{out}'" in shown
    assert "about 0.4 harmless rows quarantined, about 1.3 harmful rows kept" in " ".join(
        shown.replace("│", " ").split()
    )
    assert "[bold]clear" in shown and "2 s, loading included" in shown
    assert "note: the rows differ in layout" in shown


@pytest.mark.parametrize(("grade", "said"), [("aligned", "aligned, so"), ("weak", "weakly aligned, so")])
def test_check_ends_with_its_verdict(monkeypatch, capsys, grade, said):
    facts = {"model": "m\x1b[2J", "grade": grade, "refused": 9, "probes": 10, "coverage": 1.0, "per_probe": []}
    facts |= {"first_tokens": {"I": 0.75}, "mean_s": 1.0, "not_covered": [], "read_at": "", "trl_trains": "yes"}
    monkeypatch.setattr("gradshield.screen.check_once.check_model", lambda *_: CheckSummary(**facts))
    monkeypatch.setattr(sys, "argv", ["gradshield", "check"])
    with pytest.raises(SystemExit):
        cli.main()
    shown = capsys.readouterr().out
    assert shown.splitlines()[-1].startswith(f"m<U+001B>[2J refuses 9 of 10 probes: {said}")
    assert "\x1b" not in shown and "I 0.750" in shown and "weights that FIHS sees  100 %" in shown


def test_long_values_stay_in_their_column(monkeypatch, capsys):
    monkeypatch.setattr(terminal, "console", Console(width=80))
    terminal.show({"trl_trains": "yes, where rows hold lists of turns " * 4, "rows": 3}, False, "")
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith("can TRL train it?  yes") and len(rest) > 1
    assert all(line.startswith(" " * 13) and len(line) <= 80 for line in rest)


@pytest.mark.parametrize(("command", "registry"), [("scorers", SCORERS), ("defenses", DEFENSES)])
def test_the_lists_are_whole_at_80_columns(monkeypatch, capsys, command, registry):
    monkeypatch.setattr(cli, "console", Console(width=80))
    monkeypatch.setattr(sys, "argv", ["gradshield", command])
    with pytest.raises(SystemExit):
        cli.main()
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and not any("…" in line for line in lines)
    middle = " ".join(" ".join(line.split("│")[2].split()) for line in lines if line.startswith("│"))
    for name in registry.names():
        found = registry.find(name)[0]
        said = found.summary + "".join(
            f" {what}: {', '.join(sorted(names))}"
            for what, names in (("needs", found.needs), ("options", found.options.model_fields))
            if names
        )
        assert said in middle and any(line.startswith(f"│ {name} ") for line in lines)


def test_no_command_is_cut_in_the_list_of_commands(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gradshield", "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    shown = capsys.readouterr().out.partition("Commands:")[2]
    assert "apply" in shown and "..." not in shown and "…" not in shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["filter"], ("Missing argument 'path'", ". See gradshield filter --help.\n")),
        (["check", "--gone"], ("No such option: --gone", ". See gradshield check --help.\n")),
        (["gone"], ("No such command 'gone'", ". See gradshield --help.\n")),
    ],
)
def test_a_wrong_command_line_names_the_help_of_its_command(monkeypatch, capsys, words, said):
    code, error = run(monkeypatch, capsys, *words)
    assert code == 2 and error.startswith(f"gradshield: {said[0]}") and error.endswith(said[1])


def test_a_value_that_is_none_of_the_choices_is_told_in_our_words(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["gradshield", "filter", "a.jsonl", "--threshold", "0.5"])
    with pytest.raises(SystemExit):
        cli.main()
    said = capsys.readouterr().err
    assert "'0.5' is not one of 'anchored', 'a1', 'fixed', 'share'" in said and "Value error" not in said
