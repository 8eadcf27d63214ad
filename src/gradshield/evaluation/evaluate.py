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
from gradshield.data.run_folder import catch_write_errors
from gradshield.evaluation.config import EvaluationSettings
from gradshield.evaluation.judge import Judge, control_grades, make_judge
from gradshield.evaluation.safety import SafetyReport, safety_report, wilson
from gradshield.evaluation.sources import harmful_requests, scary_requests
from gradshield.evaluation.utility import UtilityReport
from gradshield.models.generate import continue_ids, generate, text_of
from gradshield.models.load import Model
from gradshield.models.refusal import refusals


class JudgeFailed(UserError):
    """The judge stopped answering; `report` holds the figures that need no judge."""

    def __init__(self, message: str, report: SafetyReport) -> None:
        super().__init__(message)
        self.report = report


def evaluate_safety(model: Model, settings: EvaluationSettings) -> SafetyReport:
    """ASR on harmful requests, over-refusal on harmless ones, and HS where the settings name a judge.

    Greedy, so the same model and settings give the same report. Raises UserError for requests that can't be read or a
    judge that can't be reached, JudgeFailed (with the report so far) for one that stops answering.
    """
    judge = make_judge(settings) if settings.judge else None  # before any work: it may not be there
    requests = harmful_requests(settings.requests, settings.request_count, settings.case_seed)
    scary = scary_requests(settings.scary, settings.request_count, settings.case_seed)
    report = _attack(model, requests, settings, whole=judge is not None)
    if scary:
        answers = generate(model, scary, settings.max_new_tokens, title="scary requests")
        refused = refusals(answers)
        report = replace(
            report,
            over_refusal=sum(refused) / len(scary),
            over_refusal_interval=wilson(sum(refused), len(scary)),
            scary_requests=tuple(scary),
            scary_answers=tuple(answers),
            scary_refused=tuple(refused),
        )
    return _add_grades(report, judge, settings.case_seed) if judge else report


def _attack(model: Model, requests: Sequence[str], settings: EvaluationSettings, whole: bool) -> SafetyReport:
    """ASR by the first `max_new_tokens` tokens of each answer, however many more a judge reads."""
    first = settings.max_new_tokens
    tokens = max(first, settings.judge_tokens) if whole else first
    encoded = [encode_request(request, model.tokenizer).tolist() for request in requests]
    ids = continue_ids(model, encoded, tokens, title="harmful requests")
    answers, openings = ([text_of(model, each[:n]) for each in ids] for n in (tokens, first))
    return safety_report(requests, answers, openings)


def _add_grades(report: SafetyReport, judge: Judge, seed: int) -> SafetyReport:
    report = replace(report, judge=judge.name)
    try:
        known = control_grades(judge, report.requests[:4])
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
        {
            "set": "harmful",
            "request": request,
            "answer": answer,
            "refused": refused,
            "refusal_phrase": phrased,
            **({"hs": grade} if report.judge else {}),
        }
        for request, answer, refused, phrased, grade in zip(
            report.requests, report.answers, report.refused, report.phrased, grades
        )
    ] + [
        {"set": "scary", "request": request, "answer": answer, "refused": refused}
        for request, answer, refused in zip(report.scary_requests, report.scary_answers, report.scary_refused)
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
    with catch_write_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
