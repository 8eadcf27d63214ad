"""How safe a model is, with everything that was asked for, and the answers of an evaluation as files."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gradshield.base.errors import UserError
from gradshield.base.storage import write_text
from gradshield.data.encode import encode_request
from gradshield.data.run_folder import writing
from gradshield.evaluation.config import EvaluationSettings
from gradshield.evaluation.judge import Judge, control, make_judge
from gradshield.evaluation.safety import SafetyReport, safety_report, wilson
from gradshield.evaluation.sources import harmful_requests, scary_requests
from gradshield.evaluation.utility import UtilityReport
from gradshield.models.generate import Stop, continue_ids, generate, text_of
from gradshield.models.load import Model
from gradshield.models.refusal import is_refusal


class JudgeFailed(UserError):
    """The judge gave up; `report` is what is known without it."""

    def __init__(self, message: str, report: SafetyReport) -> None:
        super().__init__(message)
        self.report = report


def evaluate_safety(model: Model, settings: EvaluationSettings) -> SafetyReport:
    """ASR on harmful requests, over-refusal on harmless ones, and HS where the settings name a judge.

    Greedy, so the same model and settings give the same report. Without a judge an answer ends where its verdict is
    known, at the first refusal phrase. Raises UserError for requests that are not to be had or a judge that is not
    there, JudgeFailed (with the report so far) for one that ceases to answer.
    """
    judge = make_judge(settings) if settings.judge else None  # before any work: it may not be there
    requests = harmful_requests(settings.requests, settings.request_count, settings.case_seed)
    scary = scary_requests(settings.scary, settings.request_count, settings.case_seed)
    report = _attacked(model, requests, settings, whole=judge is not None)
    if scary:
        answers = generate(model, scary, settings.max_new_tokens, settings.at_once, stop=_stop(settings), title="scary")
        refused = sum(map(is_refusal, answers))
        report = replace(
            report,
            over_refusal=refused / len(scary),
            over_refusal_interval=wilson(refused, len(scary)),
            scary_requests=tuple(scary),
            scary_answers=tuple(answers),
        )
    return _judged(report, judge, settings.case_seed) if judge else report


def _attacked(model: Model, requests: Sequence[str], settings: EvaluationSettings, whole: bool) -> SafetyReport:
    """ASR by the first `max_new_tokens` tokens of each answer, however many more a judge reads."""
    first = settings.max_new_tokens
    tokens = max(first, settings.judge_tokens) if whole else first
    encoded = [encode_request(request, model.tokenizer).tolist() for request in requests]
    stop = None if whole else _stop(settings)
    ids = continue_ids(model, encoded, tokens, settings.at_once, stop=stop, title="harmful requests")
    refused = [is_refusal(text_of(model, each[:first])) for each in ids]
    return safety_report(requests, [text_of(model, each) for each in ids], refused)


def _stop(settings: EvaluationSettings) -> Stop | None:
    return None if settings.whole_answers else is_refusal


def _judged(report: SafetyReport, judge: Judge, seed: int) -> SafetyReport:
    report = replace(report, judge=judge.name)
    try:
        known = control(judge, report.requests[:4])
        grades = judge.grade(report.requests, report.answers)
    except UserError as error:
        raise JudgeFailed(str(error), report) from error
    report = replace(report, grades=tuple(grades), control=known)
    stated = np.array([grade for grade in grades if grade is not None])
    if not len(stated):
        return report
    means = np.random.default_rng(seed).choice(stated, (2000, len(stated))).mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return replace(report, hs=float(stated.mean()), hs_interval=(float(low), float(high)))


def write_safety(report: SafetyReport, out: Path) -> None:
    """safety.jsonl: every request with its answer, whether that is a refusal, and the judge's grade."""
    grades = report.grades or [None] * len(report.requests)
    rows = [
        {"set": "harmful", "request": r, "answer": a, "refused": x, **({"hs": g} if report.judge else {})}
        for r, a, x, g in zip(report.requests, report.answers, report.refused, grades)
    ] + [
        {"set": "scary", "request": r, "answer": a, "refused": is_refusal(a)}
        for r, a in zip(report.scary_requests, report.scary_answers)
    ]
    _write_lines(out, "safety.jsonl", rows)


def write_utility(report: UtilityReport, out: Path) -> None:
    """utility.jsonl: every case's score, with prompt, references and answer where the task has them."""
    texts = {"prompt": report.prompts, "references": report.references, "answer": report.answers}
    texts = {name: values for name, values in texts.items() if values}
    rows = [
        {**{name: values[n] for name, values in texts.items()}, "score": score} for n, score in enumerate(report.scores)
    ]
    _write_lines(out, "utility.jsonl", rows)


def _write_lines(out: Path, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
