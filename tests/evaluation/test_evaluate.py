"""Safety with all that was asked for, and the run folder: nothing measured twice, nothing mixed, every answer kept."""

import io
import json
import sys

import pytest
import yaml

from gradshield.base.errors import UserError
from gradshield.base.settings import FilterSettings, RowSettings
from gradshield.cli import commands as cli
from gradshield.evaluation import evaluate, safety, sources
from gradshield.evaluation import measure as run
from gradshield.evaluation.config import EvaluationSettings
from gradshield.evaluation.evaluate import JudgeFailed, evaluate_safety
from gradshield.evaluation.judge import COMPLIANCE, REFUSAL, Judge
from gradshield.evaluation.measure import run_evaluation
from gradshield.evaluation.sources import choose, harmful_requests, scary_requests
from gradshield.evaluation.tasks import make_task
from gradshield.models import generate as generation
from gradshield.models.refusal import has_refusal_phrase, refusals
from gradshield.report.words import evaluation_in_words, safety_in_words

FEW = {"request_count": 5, "cases": 4, "max_new_tokens": 6, "judge_tokens": 12}


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


@pytest.fixture
def graded(monkeypatch):
    """A judge that gives what the test puts into the list, and keeps what it was shown."""
    grades, shown = [], []

    def grade(requests, answers):
        if COMPLIANCE in answers:
            return [1.5 if answer == REFUSAL else 4.5 for answer in answers]
        shown.append((requests, answers))
        if isinstance(grades[0], Exception):
            raise grades[0]
        return grades

    monkeypatch.setattr(evaluate, "make_judge", lambda settings: Judge("a judge", grade))
    return grades, shown


def test_asr_is_the_share_of_harmful_requests_answered_and_over_refusal_that_of_harmless_ones_refused(
    tiny, monkeypatch
):
    answers = ["Sure, here is …", "I'm sorry, no.", "Here is …", "I cannot do that.", "Yes: …"]
    monkeypatch.setattr(evaluate, "continue_ids", lambda model, encoded, *_, **__: [[n] for n in range(len(encoded))])
    monkeypatch.setattr(evaluate, "text_of", lambda model, ids: answers[ids[0]])
    monkeypatch.setattr(evaluate, "generate", lambda *_, **__: ["Sure.", "I can't.", "Here.", "Yes.", "Fine."])
    report = evaluate_safety(tiny, EvaluationSettings(**FEW))
    assert report.answers == tuple(answers) and report.refused == (False, True, False, True, False)
    assert report.asr == 3 / 5 and report.over_refusal == 1 / 5
    assert report.interval == pytest.approx((0.2307, 0.8824), abs=1e-4)  # Wilson's, by hand
    assert report.over_refusal_interval == pytest.approx((0.0362, 0.6245), abs=1e-4)


def test_the_report_is_of_its_own_requests_whatever_is_answered_at_once(tiny, monkeypatch):
    report = evaluate_safety(tiny, EvaluationSettings(**FEW))
    assert len(report.requests) == len(report.answers) == len(report.refused) == len(report.scary_answers) == 5
    assert list(report.refused) == refusals(report.answers)
    assert list(report.phrased) == list(map(has_refusal_phrase, report.answers))
    monkeypatch.setattr(generation, "rows_at_once", lambda _: 2)
    assert report == evaluate_safety(tiny, EvaluationSettings(**FEW))
    assert not set(report.requests) & set(report.scary_requests)


def test_a_judge_changes_no_asr_reads_more_and_ungraded_answers_are_no_grades(tiny, graded, monkeypatch):
    words = [["yes"] * 6 + ["sorry"] * 6] * 3 + [["sorry"] * 6 + ["yes"] * 6] * 2  # one a token; six of them count
    monkeypatch.setattr(evaluate, "continue_ids", lambda model, encoded, tokens, **_: [w[:tokens] for w in words])
    monkeypatch.setattr(evaluate, "text_of", lambda model, ids: " ".join(ids))
    monkeypatch.setattr(safety, "refusals", lambda texts: ["sorry" in text for text in texts])
    grades, shown = graded
    grades += [1.0, None, 4.0, 4.0, 3.0]  # a 3 is not harmful yet
    plain = evaluate_safety(tiny, EvaluationSettings(**FEW))
    judged = evaluate_safety(tiny, EvaluationSettings(**FEW, judge="x"))
    assert judged.asr == plain.asr == 3 / 5 and judged.refused == plain.refused == (False,) * 3 + (True,) * 2
    assert sum(map(len, shown[0][1])) > sum(map(len, plain.answers))
    assert judged.control == (1.5, 4.5) and plain.control is None
    assert judged.hs == 3.0 and judged.ungraded == 1 and judged.grades[1] is None
    assert judged.asr_judge == 0.5 and plain.asr_judge is None
    low, high = judged.hs_interval
    assert 1 < low < 3 < high < 5
    grades[:] = [None] * 5
    nothing = evaluate_safety(tiny, EvaluationSettings(**FEW, judge="x"))
    assert nothing.hs is None and nothing.asr_judge is None and nothing.ungraded == 5


def test_a_part_that_is_done_is_not_measured_again(tiny_folder, tmp_path, monkeypatch):
    task = tmp_path / "task.jsonl"
    task.write_text('{"prompt": "one?", "answer": "1"}\n{"prompt": "two?", "answer": ["2", "two"]}\n')
    out, settings, of = tmp_path / "run", EvaluationSettings(**FEW), FilterSettings(model=tiny_folder)
    first = run_evaluation(out, settings, of, safety=True)
    assert [row["set"] for row in lines(out / "safety.jsonl")] == ["harmful"] * 5 + ["scary"] * 5

    def no(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr(run, "evaluate_safety", no)
    both = run_evaluation(out, settings, of, safety=True, task=str(task))
    assert both.safety == first.safety and both.utility.n == 2
    assert [row["references"] for row in lines(out / "utility.jsonl")] == [["1"], ["2", "two"]]
    assert yaml.safe_load((out / "eval.yaml").read_text()) == both.as_dict()
    task.write_text('{"prompt": "three?", "answer": "3"}\n')
    with pytest.raises(UserError, match="different file"):
        run_evaluation(out, settings, of, safety=True, task=str(task))
    with pytest.raises(UserError, match=r"different settings \(case_seed: 0, now 1\)"):
        run_evaluation(out, settings.model_copy(update={"case_seed": 1}), of, safety=True)


def test_when_the_judge_gives_up_the_answers_are_kept_and_the_same_command_goes_on(tiny_folder, tmp_path, graded):
    grades, _ = graded
    grades.append(UserError("judge x: no answer"))
    settings, of = EvaluationSettings(**FEW, judge="x"), FilterSettings(model=tiny_folder)
    with pytest.raises(JudgeFailed, match="no answer"):
        run_evaluation(tmp_path / "run", settings, of, safety=True)
    assert len(lines(tmp_path / "run" / "safety.jsonl")) == 10
    grades[:] = [3.0] * 5
    settings = settings.model_copy(update={"judge": "y"})  # another, as the message advises
    summary = run_evaluation(tmp_path / "run", settings, of, safety=True)
    assert yaml.safe_load((tmp_path / "run" / "eval.yaml").read_text())["settings"]["judge"] == "y"
    with pytest.raises(UserError, match=r"different settings \(judge: y, now x\)"):
        run_evaluation(tmp_path / "run", settings.model_copy(update={"judge": "x"}), of, safety=True)
    assert summary.safety.hs == 3.0
    assert (
        "refusals 1.5" in evaluation_in_words(summary)["judge"]
        and "nothing" not in evaluation_in_words(summary)["judge"]
    )
    blind = summary.safety.model_copy(update={"judge_control": (4.5, 5.0)})
    assert "its grades say nothing" in safety_in_words(blind)["judge"]


def test_held_out_rows_come_in_any_layout(tiny_folder, tmp_path, monkeypatch):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "Say a", "input": "", "output": "a"}\n{"instruction": "b", "output": "bb"}\n')
    summary = run_evaluation(tmp_path / "run", EvaluationSettings(), FilterSettings(model=tiny_folder), rows=str(rows))
    assert summary.utility.value < 0 and summary.utility.n == 2
    assert "negative loss" in summary.utility.metric
    stream = io.TextIOWrapper(io.BytesIO(rows.read_bytes()))
    monkeypatch.setattr("sys.stdin", stream)
    piped = run_evaluation(tmp_path / "pipe", EvaluationSettings(), FilterSettings(model=tiny_folder), rows="-")
    assert piped.utility.value == summary.utility.value
    of = RowSettings(model=tiny_folder, columns={"prompt": "output", "response": "instruction"})
    (tmp_path / "task.jsonl").write_text('{"prompt": "p", "answer": "x"}\n')
    with pytest.raises(UserError, match="created with different settings"):
        run_evaluation(tmp_path / "run", EvaluationSettings(), of, task=str(tmp_path / "task.jsonl"))
    other = run_evaluation(tmp_path / "other", EvaluationSettings(), of, rows=str(rows))
    assert other.utility.value != summary.utility.value
    rows.write_text('{"instruction": "Say a", "output": "a"}\n')
    alone = run_evaluation(tmp_path / "one", EvaluationSettings(), FilterSettings(model=tiny_folder), rows=str(rows))
    assert alone.utility.interval == (None, None) and "] of" not in evaluation_in_words(alone)["utility"]


def test_a_folder_of_something_else_is_left_alone(tiny_folder, tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="not empty and not an evaluation"):
        run_evaluation(tmp_path, EvaluationSettings(**FEW), FilterSettings(model=tiny_folder), safety=True)
    assert [p.name for p in tmp_path.iterdir() if p.name != "cache"] == ["mine.txt"]


def test_what_is_wrong_is_one_line_before_a_model_is_loaded(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("gradshield.models.load.load_model", None)
    monkeypatch.delenv("GRADSHIELD_DATA", raising=False)
    task = tmp_path / "task.jsonl"
    task.write_text('{"prompt": "a", "answer": "b"}\n{"question": "a", "reply": "b"}\n')
    for arguments, words in (
        ((), ("--safety", "--task", "--rows")),
        (("--task", "gsm8k", "--rows", str(task)), ("one of",)),
        (("--task", str(task)), ("task.jsonl:2", '"prompt"', '"answer"', "question, reply")),
        (("--task", "no.jsonl"), ("no.jsonl",)),
        (("--task", "gsm8k"), ("gsm8k_test.jsonl", "GRADSHIELD_DATA")),
        (("--rows", "no.jsonl"), ("no.jsonl",)),
        (("--safety", "--requests", "advbenhc"), ("advbenhc", "advbench")),
        (("--safety", "--requests", "strongreject"), ("strongreject.jsonl", "GRADSHIELD_DATA")),
        (("--safety", "--cases", "0"), ("--cases",)),
        (("--task", str(task), "--judge", "http://host/v1"), ("--judge", "--safety")),
        (("--task", str(task), "--requests", "advbench"), ("--requests", "--safety")),
        (("--safety", "--judge-model", "m"), ("--judge URL",)),
        (("--safety", "--judge", ""), ("--judge",)),
        (("--safety", "--requests", "/dev/null"), ("/dev/null", "not a file")),
    ):
        monkeypatch.setattr(sys, "argv", ["gradshield", "eval", *arguments, "-o", str(tmp_path / "run")])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and error.count("\n") == 1 and all(w in error for w in words), error
    assert not (tmp_path / "run").exists()


def test_a_named_set_is_read_from_the_data_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADSHIELD_DATA", str(tmp_path))
    kinds = [("standard", "a b"), ("contextual", "c"), ("standard", "d")]
    (tmp_path / "harmbench.jsonl").write_text(
        "".join(json.dumps({"Behavior": text, "FunctionalCategory": kind}) + "\n" for kind, text in kinds)
    )
    (tmp_path / "jbb_benign.jsonl").write_text('{"prompt": "whole\u2028line", "behavior": "x"}\n', encoding="utf-8")
    assert harmful_requests("harmbench", 9) == ["a b", "d"]
    assert scary_requests("jailbreakbench", 9) == ["whole\u2028line"] and scary_requests("none", 9) == []
    own = tmp_path / "own.txt"
    own.write_text("one\ntwo\none\n")  # a request that occurs twice is asked once
    assert harmful_requests(str(own), 9) == ["one", "two"]


def test_a_set_that_is_not_in_the_data_folder_is_loaded_by_split_or_as_csv(tmp_path, monkeypatch):
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.delenv("GRADSHIELD_DATA", raising=False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    place = tmp_path / "hub" / "data"  # only there `datasets` takes a file's name for its split's, whatever it is
    place.mkdir(parents=True)
    for split in ("harmful", "benign"):
        pq.write_table(pa.table({"Goal": [f"{split} 1", f"{split} 2 "]}), place / f"{split}-00000-of-00001.parquet")
    (tmp_path / "rows.csv").write_text('goal,target\n"one, two",x\nthree,y\n')
    (tmp_path / "other.csv").write_text("question,target\none,x\n")
    monkeypatch.setattr(
        sources,
        "HARMFUL",
        {
            "jailbreakbench": sources.PublicSet("jbb_harmful", (str(place.parent),), "harmful"),
            "advbench": sources.PublicSet("advbench", ("csv", str(tmp_path / "rows.csv"))),
            "other": sources.PublicSet("other", ("csv", str(tmp_path / "other.csv"))),
            "offline": sources.PublicSet("offline", ("org/none", "main"), "test"),
        },
    )
    assert harmful_requests("jailbreakbench", 9) == ["harmful 1", "harmful 2"]
    assert harmful_requests("advbench", 9) == ["one, two", "three"]
    for name, words in (
        ("other", r"other: .*question, target"),
        ("offline", r"org/none can't be loaded.*put the file"),
    ):
        with pytest.raises(UserError, match=words) as excinfo:
            harmful_requests(name, 9)
        assert "\n" not in str(excinfo.value)


def test_a_broken_file_in_the_data_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADSHIELD_DATA", str(tmp_path))
    for line, words in (("half a li", "JSON lines"), ('{"prompt": null}', "columns"), ("[1]", "columns")):
        (tmp_path / "strongreject.jsonl").write_text(line + "\n")
        with pytest.raises(UserError, match=rf"strongreject.*{words}"):
            harmful_requests("strongreject", 9)


def test_a_public_record_with_a_value_of_another_type_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADSHIELD_DATA", str(tmp_path))
    arc = {"question": "q", "choices": {"label": ["A"], "text": ["a"]}}
    for file, name, record in (
        ("agnews_test1000", "agnews", {"text": "a", "label_text": 3}),
        ("dialogsum_test", "dialogsum", {"dialogue": "a", "summary": ["b"]}),
        ("arc_easy_test", "arc-easy", arc | {"answerKey": None}),
    ):
        (tmp_path / f"{file}.jsonl").write_text(json.dumps(record) + "\n")
        with pytest.raises(UserError, match=f"{name}: unexpected columns"):
            make_task(name, 9)


def test_a_seed_picks_the_same_cases_in_their_order():
    items = list(range(1000))
    picked = choose(items, 30, 4)
    assert picked == choose(items, 30, 4) == sorted(set(picked)) and len(picked) == 30
    assert picked != choose(items, 30, 5) and choose(items, 2000, 4) == items
