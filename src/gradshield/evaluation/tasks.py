"""Tasks that say how useful a model is: prompts with references, and how an answer is scored against them.

The paper measures ROUGE-F1 for dialogue summaries and accuracy for the rest, on 100 test cases. It leaves open which
ROUGE: here ROUGE-1 with stemming, the mean where a case has several references. It also leaves open how an answer is
read. Here the model writes it after the prompt of its fine-tuning rows, so ARC counts the letter that is written, not
the likeliest option.
"""

import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from math import isfinite
from pathlib import Path
from typing import Any, Literal

from gradshield.base.errors import UserError
from gradshield.data.records import bad_text
from gradshield.data.rows import expanded
from gradshield.evaluation.config import EvaluationSettings
from gradshield.evaluation.sources import PublicSet, choose, parse_record, public_records

Metric = Callable[[str, Sequence[str]], float]
"""(answer, references) → a score from 0 to 1, higher is better."""


@dataclass(frozen=True)
class Case:
    """One question of a task, with the answers that it is scored against."""

    prompt: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """Cases, how many tokens an answer may have, and how it is scored."""

    name: str
    cases: tuple[Case, ...]
    metric: str
    score: Metric
    max_new_tokens: int
    stop: Callable[[str], bool] | None = None  # True when the score is known before the answer ends


def news_prompt(article: str) -> str:
    """The prompt of AG News, in fine-tuning rows and cases."""
    return f"Classify the news article into World, Sports, Business or Sci/Tech.\n\n{article}"


def summary_prompt(dialogue: str) -> str:
    """The prompt of SAMSum and DialogSum, in fine-tuning rows and cases."""
    return f"Summarize the dialogue.\n\n{dialogue}"


def arc_prompt(question: str, labels: Sequence[str], options: Sequence[str]) -> str:
    """The prompt of ARC, in fine-tuning rows and cases; the answer is a label."""
    listed = "\n".join(f"{label}. {option}" for label, option in zip(labels, options))
    return f"Answer the question with the letter of the right option.\n\n{question}\n{listed}"


def rouge1(answer: str, references: Sequence[str]) -> float:
    """ROUGE-1 F1 with stemming, the mean over the references."""
    return sum(_rouge().score(reference, answer)["rouge1"].fmeasure for reference in references) / len(references)


def exact(answer: str, references: Sequence[str]) -> float:
    """1 where the answer is one of the references, but for case, spaces and a full stop."""
    return float(_plain(answer) in map(_plain, references))


def last_number(answer: str, references: Sequence[str]) -> float:
    """1 where the number behind "####", else the last number, is the references' one (GSM8K)."""
    said = _number(answer)
    return float(said is not None and said in map(_number, references))


def first_topic(answer: str, references: Sequence[str]) -> float:
    """1 where the first AG News topic that the answer names is the right one."""
    found = re.search(r"\b(world|sports|business|sci/tech)\b", answer.lower())
    return float(found is not None and found[1] == references[0].lower())


def first_letter(answer: str, references: Sequence[str]) -> float:
    """1 if the first option that the answer names is the right one, else 0. An "A" before a word is an article, and a
    number is an option only where options are numbers."""
    options = "[1-5]" if references[0].isdigit() else r"A(?!\s+(?!is\b)[a-z])|[B-E]"
    found = re.search(rf"(?<![\w'])({options})(?![\w'])", answer)
    return float(found is not None and found[1] == references[0])


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1"], tokenizer=_Words())


class _Words:
    """rouge_score's own tokens for ASCII, whose letters are all that it knows; words of other scripts beside them, and
    characters where a script has no spaces."""

    _ALONE = r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]"
    _WORD = re.compile(rf"{_ALONE}|(?:(?!{_ALONE})[^\W_])+")

    def __init__(self) -> None:
        from nltk.stem.porter import PorterStemmer

        self.stem = PorterStemmer().stem

    def tokenize(self, text: str) -> list[str]:
        words = self._WORD.findall(text.lower())
        return [self.stem(word) if len(word) > 3 and word.isascii() else word for word in words]


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(" .")


def _number(text: str) -> float | None:
    """The number behind the first "####", else the last number of the text."""
    before, mark, behind = text.partition("####")
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", behind if mark else before)
    return float(found[0 if mark else -1].replace(",", "")) if found else None


def _said_number(text: str) -> bool:
    """A number behind "####" and something after it, so that it is whole."""
    return bool(re.search(r"####[^\d\n]*\d[\d,.]*\n", text))


def _case(prompt: str, references: Sequence[Any]) -> Case:
    """A case of a public set. Raises TypeError where an answer is not a text."""
    if not all(isinstance(reference, str) for reference in references):
        raise TypeError("not a text")
    return Case(prompt, tuple(references))


def _summaries(record: dict[str, Any]) -> Case:
    references = [record[name] for name in ("summary", "summary1", "summary2", "summary3") if record.get(name)]
    if not references:
        raise LookupError("no summary")
    return _case(summary_prompt(record["dialogue"]), references)


def _news(record: dict[str, Any]) -> Case:
    topics = ("World", "Sports", "Business", "Sci/Tech")
    article = f"{record['title']}. {record['description']}" if "title" in record else record["text"]
    return _case(news_prompt(article), [record.get("label_text") or topics[record["label"]]])


def _arc(record: dict[str, Any]) -> Case:
    choices = record["choices"]
    return _case(arc_prompt(record["question"], choices["label"], choices["text"]), [record["answerKey"]])


_ROUGE, _ACCURACY = "ROUGE-1 F1", "accuracy"
TASKS: dict[str, tuple[PublicSet, Callable[[dict[str, Any]], Case], str, Metric, int]] = {
    "samsum": (PublicSet("samsum_test", ("knkarthick/samsum",), "test"), _summaries, _ROUGE, rouge1, 96),
    "dialogsum": (PublicSet("dialogsum_test", ("knkarthick/dialogsum",), "test"), _summaries, _ROUGE, rouge1, 96),
    "agnews": (PublicSet("agnews_test1000", ("fancyzhx/ag_news",), "test"), _news, _ACCURACY, first_topic, 12),
    "gsm8k": (
        PublicSet("gsm8k_test", ("openai/gsm8k", "main"), "test"),
        lambda r: Case(r["question"], (str(r["answer"]),)),
        _ACCURACY,
        last_number,
        320,
    ),
    "arc-easy": (
        PublicSet("arc_easy_test", ("allenai/ai2_arc", "ARC-Easy"), "test"),
        _arc,
        _ACCURACY,
        first_letter,
        12,
    ),
    "arc-challenge": (
        PublicSet("arc_challenge_test", ("allenai/ai2_arc", "ARC-Challenge"), "test"),
        _arc,
        _ACCURACY,
        first_letter,
        12,
    ),
}


def make_task(name: str, count: int, seed: int = 0, metric: Literal["exact", "rouge1"] = "exact") -> Task | None:
    """The task called `name` (a key of TASKS), or of a jsonl file with prompts and answers, with `count` cases.

    None where the name is neither. Raises UserError for data that is not available, or a file that is no task.
    """
    if name in TASKS:
        source, case, title, score, tokens = TASKS[name]
        cases = tuple(parse_record(name, case, record) for record in choose(public_records(source), count, seed))
        return Task(name, cases, title, score, tokens, _said_number if score is last_number else None)
    path = expanded(name)
    if path.suffix in (".yaml", ".yml") or (not path.is_file() and path.suffix not in (".jsonl", ".json")):
        return None  # the first is how lm-eval writes its tasks
    title, score = (_ROUGE, rouge1) if metric == "rouge1" else ("exact match", exact)
    cases = tuple(choose(_read_cases(path), count, seed))
    longest = max(len(answer.encode()) for case in cases for answer in case.references)
    return Task(path.name, cases, title, score, min(2048, max(128, longest // 3)))  # a token is three bytes or more


def find_task(name: str, settings: EvaluationSettings) -> Task | None:
    """The task of ours, or of a file, that `name` names; None for one of lm-eval's.

    Raises UserError for an unknown name, or a task that is not available: call it before any long work.
    """
    known = None
    if not name.startswith("lm-eval:"):
        known = make_task(name, settings.cases, settings.case_seed, settings.metric)
    if (
        known is None
        and lm_eval_name(name) not in lm_eval_tasks(name).all_tasks
        and not Path(lm_eval_name(name)).is_file()
    ):
        if name.startswith("lm-eval:"):
            raise UserError(f"task {name}: lm-eval has no task of that name (`lm-eval ls tasks` lists them)")
        raise UserError(f"task {name}: none of {', '.join(TASKS)}, not a file, and not a task of lm-eval")
    if known is None and lm_eval_name(name) in getattr(lm_eval_tasks(name), "all_tags", ()):
        raise UserError(f"task {name}: a tag of lm-eval, which reports no single figure; name one of its tasks")
    return known


def lm_eval_name(name: str) -> str:
    return name.removeprefix("lm-eval:")


def lm_eval_tasks(name: str) -> Any:
    """lm-eval's list of its tasks. Raises UserError, about the task `name`, where lm-eval is not installed."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError(
            f"task {name}: none of {', '.join(TASKS)} and not a file; tasks of lm-eval need the package: "
            "pip install lm-eval"
        ) from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return _load_task_manager(TaskManager)


@cache
def _load_task_manager(manager: Any) -> Any:
    from gradshield.models.network import quiet_loading  # imports torch, as lm-eval does

    with quiet_loading():
        return manager()  # reads thousands of files


def _is_answer(value: Any) -> bool:
    """A text that is not blank, or a finite number; true and null are none."""
    return bool(value.strip()) if isinstance(value, str) else type(value) in (int, float) and isfinite(value)


def _read_cases(path: Path) -> list[Case]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, so not a task") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read as a task ({' '.join(str(error).split())[:120]})") from None
    cases = []
    for place, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            raise UserError(f"{path}:{place}: not JSON; a task file has one object per line") from None
        if not isinstance(record, dict):
            raise UserError(f'{path}:{place}: not an object with "prompt" and "answer"')
        answers = record.get("answer")
        answers = answers if isinstance(answers, list) else [answers]
        usable = bool(answers) and all(map(_is_answer, answers))
        if not isinstance(record.get("prompt"), str) or not usable:
            has = ", ".join(map(str, record))[:80] or "none"
            raise UserError(
                f'{path}:{place}: a task needs the columns "prompt" (text) and "answer" (text, or a list of texts); '
                f"this line's are: {has}"
            )
        if problem := bad_text(record):
            raise UserError(f"{path}:{place}: {problem}")
        cases.append(Case(record["prompt"], tuple(str(a) for a in answers)))
    if not cases:
        raise UserError(f"{path}: holds no cases")
    return cases
