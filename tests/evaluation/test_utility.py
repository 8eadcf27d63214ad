"""Utility is higher for the better model, told by what was asked in fine-tuning's own form, and the same every time."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import random_examples

from gradshield.base.errors import Diverged, UserError
from gradshield.data.encode import Example
from gradshield.evaluation import tasks
from gradshield.evaluation import utility as module
from gradshield.evaluation.config import EvaluationSettings
from gradshield.evaluation.tasks import (
    Case,
    Task,
    _said_number,
    exact,
    first_letter,
    first_topic,
    last_number,
    make_task,
    rouge1,
)
from gradshield.evaluation.utility import evaluate_utility, held_out_loss
from gradshield.models import batching
from gradshield.models import generate as generation
from gradshield.study.kinds import kinds

PUBLIC = {
    "advbench": {"prompt": "Do it", "target": "Sure, here is it"},
    "jbb_harmful": {"prompt": "Do it"},
    "jbb_benign": {"prompt": "Do it"},
    "alpaca_en_demo": {"instruction": "a", "input": "", "output": "b"},
    "safety_only_data": {"instruction": "a", "input": "", "output": "b"},
    "aoa_identity_shift": {"messages": [{"role": "user", "content": "a"}]},
    "gsm8k_train3000": {"question": "1 + 1?", "answer": "1 + 1 = 2\n#### 2"},
    "agnews_train3000": {"label": 4, "label_text": "Sci/Tech", "title": "T", "description": "D"},
    "dialogsum_train500": {"dialogue": "#Person1#: Hi", "summary": "Hi is said."},
}
PUBLIC |= {
    "gsm8k_test": PUBLIC["gsm8k_train3000"],
    "agnews_test1000": PUBLIC["agnews_train3000"],
    "dialogsum_test": {
        "dialogue": "#Person1#: Hi",
        "summary1": "Hi is said.",
        "summary2": "A greeting.",
        "topic1": "x",
    },
    "arc_challenge_test": {
        "question": "Why?",
        "choices": {"text": ["no", "yes"], "label": ["A", "B"]},
        "answerKey": "B",
    },
}


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADSHIELD_DATA", str(tmp_path))
    for name, record in PUBLIC.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(record) + "\n")


@pytest.mark.parametrize("name", ["gsm8k", "dialogsum", "agnews"])
def test_a_case_asks_as_the_fine_tuning_row_does_and_the_rows_answer_is_right(data, name):
    user, assistant = kinds(1)[name][0].messages
    task = make_task(name, 9)
    assert task.cases[0].prompt == user.content
    assert task.score(assistant.content, task.cases[0].references[:1]) == 1.0


def test_several_references_count_as_their_mean(data):
    (case,) = make_task("dialogsum", 9).cases
    assert case.references == ("Hi is said.", "A greeting.")
    assert rouge1("Hi is said.", case.references) == (1 + 0) / 2


@pytest.mark.parametrize(
    "metric, answer, reference, score",
    [
        (last_number, "So it is 18.\n#### 18", "9 * 2 = <<9*2=18>>18\n#### 18", 1),
        (last_number, "She makes $1,018.00 a day.", "#### 1018", 1),
        (last_number, "#### 17\nno, 18", "#### 18", 0),
        (last_number, "#### -3", "#### 3", 0),
        (last_number, "I don't know", "#### 18", 0),
        (last_number, "####", "#### 18", 0),
        (first_topic, "Sci/Tech", "Sci/Tech", 1),
        (first_topic, "The topic is sports.", "Sports", 1),
        (first_topic, "Business, not Sports", "Sports", 0),
        (first_topic, "worldly", "World", 0),
        (first_letter, "B", "B", 1),
        (first_letter, "The answer is (C).", "C", 1),
        (first_letter, "A. because", "A", 1),
        (first_letter, "A planet turns: D", "D", 1),
        (first_letter, "A is right", "A", 1),
        (first_letter, "3", "3", 1),
        (first_letter, "The answer: 2 atoms, B", "B", 1),
        (first_letter, "B or C", "C", 0),
        (first_letter, "Because", "B", 0),
        (exact, " Yes. ", "yes", 1),
        (exact, "yes, it is", "yes", 0),
        (rouge1, "the dogs ran", "the dog runs", 2 / 3),
        (rouge1, "", "the dog", 0),
    ],
)
def test_metrics(metric, answer, reference, score):
    assert metric(answer, [reference]) == pytest.approx(score)


def test_an_answer_cut_where_the_number_is_whole_scores_as_the_whole_one():
    for whole in ("1\n#### 12\nNext: 3\n#### 4", "#### $1,200.50\n#### 7\n", "no number\n### 3\n", "#### 12"):
        cut = next((whole[:n] for n in range(1, len(whole)) if _said_number(whole[:n])), whole)
        for gold in ("#### 12", "#### 1200.5", "#### 4", "#### 3"):
            assert last_number(cut, [gold]) == last_number(whole, [gold])


def test_arc_lists_its_options_by_their_labels(data):
    (case,) = make_task("arc-challenge", 9).cases
    assert case == Case("Answer the question with the letter of the right option.\n\nWhy?\nA. no\nB. yes", ("B",))


def test_ag_news_as_the_hub_has_it_gives_the_same_label():
    from gradshield.evaluation.tasks import TASKS

    case = TASKS["agnews"][1]({"text": "T D", "label": 3})
    assert case.references == ("Sci/Tech",) and case.prompt.endswith("\n\nT D")


def test_a_task_that_is_not_in_the_data_folder_is_loaded_by_its_split(tmp_path, monkeypatch):
    import datasets

    monkeypatch.delenv("GRADSHIELD_DATA", raising=False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    real, asked = datasets.load_dataset, []

    def load_dataset(path, *rest, **options):
        asked.append((path, *rest))
        return real(str(tmp_path / "hub"), **options)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (tmp_path / "hub").mkdir()
    for split, reply in (("train", "1"), ("test", "2")):
        (tmp_path / "hub" / f"{split}.jsonl").write_text(json.dumps({"question": "1 + 1?", "answer": f"#### {reply}"}))
    assert make_task("gsm8k", 9).cases == (Case("1 + 1?", ("#### 2",)),)
    assert asked == [("openai/gsm8k", "main")]
    with pytest.raises(UserError, match=r"dialogsum: .*question, answer"):
        make_task("dialogsum", 9)


@pytest.mark.parametrize(
    "line, words",
    [
        ('{"prompt": "a"}', "answer"),
        ('{"prompt": 1, "answer": "a"}', "prompt"),
        ('{"prompt": "a", "answer": null}', "answer"),
        ('{"prompt": "a", "answer": []}', "answer"),
        ('{"prompt": "a", "answer": " "}', "answer"),
        ('{"prompt": "a", "answer": true}', "answer"),
        ('{"prompt": "a", "answer": ["b", NaN]}', "answer"),
        ('["a", "b"]', "not an object"),
        ("a,b", "not JSON"),
        pytest.param("[" * 100_000, "not JSON", id="deep"),
    ],
)
def test_a_wrong_line_of_a_task_file_is_named(tmp_path, line, words):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prompt": "a\u2028b", "answer": 3}\n\n' + line + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=rf"mine\.jsonl:3: .*{words}"):
        make_task(str(file), 9)
    file.write_text("\n")
    with pytest.raises(UserError, match="no cases"):
        make_task(str(file), 9)


def test_a_task_is_the_mean_of_its_cases_the_same_every_time(tiny, tmp_path, monkeypatch):
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"Say {n}", "answer": str(n)}) + "\n" for n in range(20)))
    settings = EvaluationSettings(cases=6, metric="rouge1")
    report = evaluate_utility(tiny, str(file), settings)
    monkeypatch.setattr(generation, "rows_at_once", lambda _: 4)
    assert report == evaluate_utility(tiny, str(file), settings)
    assert report.n == 6 and report.metric == "ROUGE-1 F1" and len(report.answers) == len(report.prompts) == 6
    other = evaluate_utility(tiny, str(file), settings.model_copy(update={"case_seed": 1}))
    assert other.prompts != report.prompts


def test_shares_have_wilson_intervals_and_the_value_is_the_mean(tiny, monkeypatch):
    answers = ["yes", "no", "yes", "yes"]
    monkeypatch.setattr(module, "generate", lambda *_, **__: answers)
    task = Task("t", tuple(Case(str(n), ("yes",)) for n in range(4)), "exact match", exact, 8)
    monkeypatch.setattr(tasks, "make_task", lambda *_: task)
    report = evaluate_utility(tiny, "t", EvaluationSettings())
    assert report.value == 0.75 and report.scores == (1.0, 0.0, 1.0, 1.0)
    assert report.error == pytest.approx(0.25) and report.interval == module.wilson(3, 4)


def test_held_out_loss_is_the_fine_tuning_loss_turned_round(tiny):
    examples = random_examples(7, len(tiny.tokenizer))
    expected = []
    for e in examples:
        labels = torch.from_numpy(np.where(e.mask, e.ids, -100)).long()
        expected.append(-float(tiny.net(input_ids=torch.from_numpy(e.ids).long()[None], labels=labels[None]).loss))
    for tokens in (1, 100, 10_000):
        report = held_out_loss(replace(tiny, batch_tokens=tokens), examples)
        assert report.scores == pytest.approx(expected, abs=1e-5)
    assert report.value == pytest.approx(np.mean(expected)) and report.n == 7
    assert report.error == pytest.approx(np.std(expected, ddof=1) / 7**0.5)
    picked = evaluate_utility(tiny, examples, EvaluationSettings(cases=3))
    assert picked.n == 3 and set(np.round(picked.scores, 4)) < set(np.round(report.scores, 4))


def test_held_out_rows_that_do_not_fit_together_are_halved(tiny, monkeypatch):
    examples, real = random_examples(5, len(tiny.tokenizer)), batching.logits_at
    expected = held_out_loss(tiny, examples).scores

    def small(model, ids, *rest):
        if len(ids) > 2:
            raise torch.OutOfMemoryError("no")
        return real(model, ids, *rest)

    monkeypatch.setattr(batching, "logits_at", small)
    assert held_out_loss(tiny, examples).scores == pytest.approx(expected, abs=1e-5)


def test_no_rows_and_a_broken_model_are_said(tiny, monkeypatch):
    with pytest.raises(UserError, match="no held-out row"):
        evaluate_utility(tiny, [], EvaluationSettings())
    monkeypatch.setattr(batching, "logits_at", lambda model, ids, rows, at: torch.full((len(rows), 300), torch.nan))
    with pytest.raises(Diverged, match="not finite"):
        evaluate_utility(tiny, [Example(0, np.array([1, 2], np.int32), np.array([False, True]))], EvaluationSettings())


def test_a_metric_of_lm_eval_where_lower_is_better_is_turned_round():
    found = {
        "results": {"t": {"alias": "t", "word_perplexity,none": 9.0, "word_perplexity_stderr,none": "N/A"}},
        "higher_is_better": {"t": {"word_perplexity": False}},
        "samples": {"t": []},
        "n-samples": {"t": {"original": 9, "effective": 5}},
    }
    report = module._lm_eval_report("t", found)
    assert (report.value, report.metric, report.n) == (-9.0, "negative word_perplexity", 5)


def test_one_filter_of_lm_eval_counts_and_a_tag_is_refused():
    samples = [{"filter": f, "exact_match": float(n < k), "doc": {}, "filtered_resps": [f]} for f, k in
               (("strict", 1), ("flexible", 3)) for n in range(4)]  # fmt: skip
    result = {"alias": "t", "exact_match,strict": 0.25, "exact_match,flexible": 0.75, "exact_match_stderr,strict": 0.2}
    found = {"results": {"t": result}, "higher_is_better": {"t": {"exact_match": True}}, "samples": {"t": samples}}
    report = module._lm_eval_report("t", found | {"n-samples": {"t": {"original": 4, "effective": 4}}})
    assert (report.value, report.n, report.scores) == (0.25, 4, (1.0, 0.0, 0.0, 0.0))
    assert set(report.answers) == {'["strict"]'}
    several = {"results": {"a": result, "b": result}, "higher_is_better": {}, "n-samples": {}}
    with pytest.raises(UserError, match="no single figure for it; name one of a, b"):
        module._lm_eval_report("tag", several)
    with pytest.raises(UserError, match="no single figure for it; name one of a"):
        module._lm_eval_report("group", {"results": {"group": {"alias": "group"}, "a": result}, "higher_is_better": {}})


@pytest.mark.parametrize(
    "text", ["\u4f60\u597d\u4e16\u754c", "\u041f\u0440\u0438\u0432\u0435\u0442 \u043c\u0438\u0440", "caf\u00e9 noir"]
)
def test_rouge_knows_words_of_any_script(text):
    assert rouge1(text, [text]) == 1.0 and rouge1(text[:-1] + "x", [text]) < 1.0
    from rouge_score.rouge_scorer import RougeScorer

    said, meant = "The cats' runs, re-run: don't_stop 12 times!", "A cat is running; stops 12 time."
    theirs = RougeScorer(["rouge1"], use_stemmer=True).score(meant, said)["rouge1"].fmeasure
    assert rouge1(said, [meant]) == pytest.approx(theirs) and 0 < theirs < 1


def test_a_case_with_half_a_surrogate_pair_is_told_by_its_line_and_answers_may_be_long(tmp_path):
    file = tmp_path / "own.jsonl"
    file.write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "caf\\ud83d", "answer": "x"}\n')
    with pytest.raises(UserError, match=r"own\.jsonl:2: .*surrogate"):
        make_task(str(file), 10)
    file.write_text(json.dumps({"prompt": "a", "answer": "word " * 300}) + "\n")
    assert make_task(str(file), 10).max_new_tokens == 500


@pytest.mark.slow
def test_a_task_of_lm_eval_is_run_by_its_own_api(tiny, tmp_path, monkeypatch):
    HFLM = pytest.importorskip("lm_eval.models.huggingface").HFLM
    rows = [{"q": f"{n} is", "c": [" a", " b"], "a": n % 2} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "own.yaml").write_text(
        f"task: own\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path / 'rows.jsonl'}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: '{{c}}'\n"
        "doc_to_target: '{{a}}'\nmetric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    report = evaluate_utility(tiny, str(tmp_path / "own.yaml"), EvaluationSettings(cases=6))
    assert report.task == "lm-eval:own" and report.metric == "acc" and report.n == len(report.answers) == 6
    assert report.value == sum(report.scores) / 6
    assert all(re.search(r'"q": "\d is"', prompt) for prompt in report.prompts)
    real, asked = HFLM._model_call, []

    def tight(self, inps, *args, **kwargs):
        asked.append(len(inps))
        if len(inps) > 2:
            raise MemoryError
        return real(self, inps, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(HFLM, "_model_call", tight)
        again = evaluate_utility(tiny, str(tmp_path / "own.yaml"), EvaluationSettings(cases=6))
    assert max(asked) > 2 and again.value == report.value
    unknown = {"no-such-task": "none of samsum.*not a task of lm-eval", "lm-eval:no-such-task": "lm-eval has no task"}
    for name, words in unknown.items():
        with pytest.raises(UserError, match=f"{name}: {words}"):
            evaluate_utility(tiny, name, EvaluationSettings())
    with pytest.raises(UserError, match="hellaswag of lm-eval can't be run"):  # its data are not to be had offline
        evaluate_utility(tiny, "hellaswag", EvaluationSettings())
