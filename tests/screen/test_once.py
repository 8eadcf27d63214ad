"""What is done already is shown without the model, and only if everything about it is the same."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from review.made import chat, digests, make_run, write_jsonl

from gradshield.base.errors import UserError
from gradshield.base.settings import FilterSettings
from gradshield.base.storage import read_yaml
from gradshield.data.run_folder import RunPlan, find_run, versions, write_run
from gradshield.data.summaries import FilterSummary
from gradshield.models.on_disk import disk_fingerprint
from gradshield.review.apply import apply_decisions
from gradshield.screen.filter_once import filter_file

RUN = (  # the command, then the heavy modules that it imported, on the last line
    "import sys; sys.argv = ['gradshield', *sys.argv[1:]]\n"
    "from gradshield.cli import main\n"
    "heavy = {'torch', 'transformers', 'datasets', 'matplotlib', 'scipy', 'sklearn'}\n"
    "try: main()\nfinally: print('imported', *heavy & set(sys.modules))"
)


@pytest.fixture
def folder(tmp_path):
    """Files as of a model; nobody loads them."""
    place = tmp_path / "model"
    place.mkdir()
    (place / "config.json").write_text("{}")
    (place / "model.safetensors").write_bytes(b"weights")
    return place


@pytest.fixture
def done(tmp_path, folder):
    """(file, run folder, settings) of a finished run."""
    file = write_jsonl(tmp_path / "rows.jsonl", [chat("a", "b"), chat("c", "d")])
    run = make_run(tmp_path / "run", file, [-1.0, 1.0], model=str(folder))
    settings = FilterSettings(model=str(folder))
    saved = read_yaml(run / "run.yaml") | {"versions": versions(), "file": {}}
    saved["model"]["files"] = disk_fingerprint(settings)
    write_run(run, saved)
    return file, run, settings


def called(*words, cwd=None):
    """(exit code, what it printed, the heavy modules that it imported, its errors) of a command."""
    done = subprocess.run([sys.executable, "-c", RUN, *words], capture_output=True, text=True, cwd=cwd)
    printed, _, heavy = done.stdout.rpartition("imported")
    return done.returncode, printed, heavy.split(), done.stderr


def test_a_finished_run_is_shown_without_torch(done, folder):
    file, run, _ = done
    for left in (".lock", "scores.partial"):  # by a kill after the last write
        (run / left).touch()
    code, said, heavy, _ = called("filter", str(file), "-o", str(run), "--model", str(folder), "--json")
    assert not code and not heavy and json.loads(said)["rows"] == 2
    assert not (run / ".lock").exists() and not (run / "scores.partial").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--help", ""),
        ("filter --help", ""),
        ("filter gone.jsonl", "gone.jsonl: no such file or folder"),
        ("filter {file} --scorer gone", "--scorer gone: no such scorer"),
        ("filter {file} --threshold gone", "--threshold"),
        ("filter {file} --max-length x", "--max-length"),
        ("filter {file} --gone", "--gone"),
        ("filter {file} --config {probes}", "probes gone: no such file"),
        ("filter {file} --reference gone.jsonl", "gone.jsonl: no such file or folder"),
        ("filter {file} --chat-template gone", "--chat-template gone: no such file"),
        ("filter {file} --model /gone", "model /gone: no such folder"),
        ("filter {file} --model gone.gguf --dry-run", "gone.gguf: no such GGUF file"),
        ("filter {file} --adapter ./gone", "adapter ./gone: no such folder"),
        ("filter {other}", "columns a, b match no known layout"),
        ("check --model /gone", "model /gone: no such folder"),
        ("tune gone.jsonl", "gone.jsonl: no such file or folder"),
        ("tune {file} --defense gone", "--defense gone: no such defense"),
        ("eval", "nothing to measure"),
        ("eval --task gone.jsonl", "gone.jsonl: no such file, so not a task"),
        ("eval --safety --requests gone", "gone: not a file, and not a known set"),
        ("eval --rows gone.jsonl", "gone.jsonl: no such file or folder"),
        ("explain gone 1", "gone: not a run folder"),
        ("explain {run} 0", "no row 0; it has 2 rows"),
        ("explain {run} 3", "no row 3; it has 2 rows"),
        ("review gone", "gone: not a run folder"),
        ("apply gone", "gone: not a run folder"),
    ],
)
def test_help_and_mistakes_are_said_before_torch_is_imported(done, tmp_path, words, said):
    file, run, _ = done
    other = write_jsonl(tmp_path / "other.jsonl", [{"a": 1, "b": 2}])
    (probes := tmp_path / "probes.yaml").write_text("probes: gone\n")
    code, _, heavy, error = called(*words.format(file=file, run=run, other=other, probes=probes).split(), cwd=tmp_path)
    assert not heavy and code == (2 if said else 0), error
    assert said in error and error.count("\n") <= 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("filter {file} --scorer fihs:bad=1", "--scorer fihs: no option 'bad'; it has normalise"),
        ("filter {file} --scorer fihs:probes=x", "--scorer fihs: probes=x: "),
        ("tune {file} --defense lisa:bad=1", "--defense lisa: no option 'bad'; it has safe, count"),
    ],
)
def test_a_wrong_option_is_said_in_one_line(done, tmp_path, words, said):
    code, _, _, error = called(*words.format(file=done[0]).split(), cwd=tmp_path)
    assert code == 2 and said in error and error.count("\n") <= 1


@pytest.mark.parametrize("what", ["row", "weights", "template", "setting", "version", "summary"])
def test_a_run_of_other_rows_model_settings_or_versions_is_looked_at_with_the_model(done, folder, monkeypatch, what):
    file, run, settings = done
    assert filter_file(str(file), run, settings).rows == 2
    saved = read_yaml(run / "run.yaml")
    if what == "row":
        file.write_text(file.read_text().replace('"d"', '"e"'))
    elif what == "weights":
        (folder / "model.safetensors").write_bytes(b"Weights")
    elif what == "template":
        (folder / "chat_template.jinja").write_text("")
    elif what == "setting":
        settings = settings.model_copy(update={"max_length": 9})
    elif what == "version":
        write_run(run, saved | {"versions": saved["versions"] | {"torch": "0"}})
    elif what == "summary":
        write_run(run, {part: content for part, content in saved.items() if part != "summary"})
    monkeypatch.setitem(sys.modules, "gradshield.screen.filter", SimpleNamespace(run_filter=lambda *_: "by the model"))
    assert filter_file(str(file), run, settings) == "by the model"


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_shows_that_the_model_is_loaded(done, tmp_path, monkeypatch, capsys, terminal):
    file, _, settings = done
    monkeypatch.setitem(sys.modules, "gradshield.screen.filter", SimpleNamespace(run_filter=lambda *_: None))
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    filter_file(str(file), tmp_path / "new", settings)
    assert capsys.readouterr().err == f"loading {settings.model}\n" * terminal


@pytest.mark.parametrize(
    ("lost", "does"),
    [
        ("kept.jsonl", "gradshield apply {run}"),
        ("quarantined.jsonl", "gradshield apply {run}"),
        ("set_aside.jsonl", "gradshield apply {run}"),
        ("report.html", "gradshield apply {run}"),
        ("scores.parquet", "delete {run}"),
    ],
)
def test_a_finished_run_that_lost_a_file_says_which_and_what_brings_it_back(done, lost, does):
    file, run, settings = done
    apply_decisions(run)  # the report tells what this run.yaml says
    before = digests(run)
    (run / lost).unlink()
    plan = RunPlan.model_validate({k: v for k, v in read_yaml(run / "run.yaml").items() if k != "summary"})
    for look in (lambda: filter_file(str(file), run, settings), lambda: find_run(run, plan, FilterSummary)):
        with pytest.raises(UserError) as told:
            look()
        named = {"kept.jsonl": "the file of kept rows", "quarantined.jsonl": "the file of quarantined rows"}
        assert f"{run}: {named.get(lost, lost)} is missing" in str(told.value) and does.format(run=run) in str(
            told.value
        )
    if "apply" in does:
        apply_decisions(run)
        assert digests(run) == before and filter_file(str(file), run, settings).rows == 2


def test_what_came_from_stdin_is_not_brought_back_by_apply(done):
    _, run, _ = done
    saved = read_yaml(run / "run.yaml")
    saved["input"]["path"] = "-"
    plan = RunPlan.model_validate({k: v for k, v in saved.items() if k != "summary"})
    (run / "kept.jsonl").unlink()
    with pytest.raises(UserError, match=r"kept rows is missing.* delete"):
        find_run(run, plan, FilterSummary)


def test_a_summary_that_lacks_a_figure_is_damage_and_the_rest_comes_back_as_it_is_saved(done):
    file, run, settings = done
    saved = read_yaml(run / "run.yaml")
    assert list(filter_file(str(file), run, settings).as_dict().items()) == list(saved["summary"].items())
    del saved["summary"]["threshold"]["rule"]
    write_run(run, saved)
    with pytest.raises(UserError, match=r"run\.yaml: damaged \(summary\.threshold\.rule\)"):
        filter_file(str(file), run, settings)


def test_an_adapters_base_counts_and_what_is_not_here_has_no_fingerprint(tmp_path, folder):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder)}))
    before = disk_fingerprint(FilterSettings(model=str(adapter)))
    assert before and before != disk_fingerprint(FilterSettings(model=str(folder)))
    (folder / "model.safetensors").write_bytes(b"others")
    assert disk_fingerprint(FilterSettings(model=str(adapter))) not in (None, before)
    for name in ("no/such", str(tmp_path / "none"), "~"):
        assert disk_fingerprint(FilterSettings(model=name)) is None
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(adapter)}))
    assert disk_fingerprint(FilterSettings(model=str(adapter))) is None
