"""Utility: a task's mean score, loss on held-out rows, or a task of lm-eval; higher is better, always."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, sqrt
from statistics import stdev
from typing import Any

import torch

from gradshield.base.errors import Diverged, UserError, one_line, out_of_memory
from gradshield.base.progress import progress
from gradshield.data.encode import Example
from gradshield.data.examples import token_counts
from gradshield.evaluation.config import EvaluationSettings
from gradshield.evaluation.safety import wilson
from gradshield.evaluation.sources import choose
from gradshield.evaluation.tasks import Task, find_task, lm_eval_name, lm_eval_tasks
from gradshield.models.batching import losses, map_by_length
from gradshield.models.generate import generate, rows_at_once
from gradshield.models.load import Model, free_memory
from gradshield.models.network import quiet_loading

HELD_OUT_LOSS = "negative loss (nats per response token, mean over rows)"


@dataclass(frozen=True)
class UtilityReport:
    """A mean score, higher is better, with its standard error and 95 % interval (Wilson for shares), and what each
    case got. Held-out rows have no texts here; their scores are in the order in which they were picked."""

    task: str
    metric: str
    value: float
    error: float  # standard error of `value`
    interval: tuple[float, float]
    n: int
    scores: tuple[float, ...]
    prompts: tuple[str, ...] = ()
    references: tuple[tuple[str, ...], ...] = ()
    answers: tuple[str, ...] = ()


def evaluate_utility(model: Model, task: str | Sequence[Example], settings: EvaluationSettings) -> UtilityReport:
    """How useful the model is at `task`: a name of TASKS, a jsonl file with prompts and answers, or a task of lm-eval
    ("lm-eval:NAME" where the name is taken). Held-out examples are also a task; their loss counts.

    Greedy, on `settings.cases` cases that the seed picks. Raises UserError for an unknown or unavailable task.
    """
    if not isinstance(task, str):
        return held_out_loss(model, choose(task, settings.cases, settings.case_seed))
    known = find_task(task, settings)
    return _task_utility(model, known) if known else _lm_eval(model, lm_eval_name(task), settings)


def _task_utility(model: Model, task: Task) -> UtilityReport:
    prompts = [case.prompt for case in task.cases]
    answers = generate(model, prompts, task.max_new_tokens, stop=task.stop, title=task.name)
    scores = [task.score(answer, case.references) for answer, case in zip(answers, task.cases)]
    references = tuple(case.references for case in task.cases)
    texts = (tuple(prompts), references, tuple(answers))
    return UtilityReport(task.name, task.metric, *_mean(scores), len(scores), tuple(scores), *texts)


@torch.no_grad()
def held_out_loss(model: Model, examples: Sequence[Example]) -> UtilityReport:
    """The negative of the fine-tuning loss on rows that were not trained on: mean next-token cross-entropy over each
    row's response tokens, then over rows. Raises UserError without rows, Diverged for a loss that is not finite."""
    if not examples:
        raise UserError("no held-out row to measure the loss on")

    def scored(batch: Sequence[int]) -> list[float]:
        return (-losses(model, [examples[n] for n in batch])).tolist()

    lengths, fix = token_counts(examples), "use a smaller model or --quantize"
    with progress("held-out loss", 0, len(examples)) as advance:
        scores = map_by_length(scored, lengths, model.batch_tokens, fix=fix, advance=advance)
    if not all(map(isfinite, scores)):
        raise Diverged(f"{model.name}: its loss on held-out rows is not finite, so it is broken")
    return UtilityReport("held-out rows", HELD_OUT_LOSS, *_mean(scores), len(scores), tuple(scores))


def _mean(scores: Sequence[float]) -> tuple[float, float, tuple[float, float]]:
    """Mean, its standard error, and the 95 % interval: Wilson's for a share, else by the normal distribution."""
    value = sum(scores) / len(scores)
    error = stdev(scores) / sqrt(len(scores)) if len(scores) > 1 else float("nan")
    if set(scores) <= {0.0, 1.0}:
        return value, error, wilson(int(sum(scores)), len(scores))
    return value, error, (value - 1.96 * error, value + 1.96 * error)


def _lm_eval(model: Model, name: str, settings: EvaluationSettings) -> UtilityReport:
    """A task of lm-eval as it defines it, on its first cases; its first metric, turned round where lower is better."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    manager = lm_eval_tasks(name)
    wrap: Any = HFLM
    evaluate: Any = simple_evaluate  # its decorator hides its parameters
    at_once = rows_at_once(model)
    while True:
        with quiet_loading():
            wrapped = wrap(pretrained=model.net, tokenizer=model.tokenizer, batch_size=at_once)
        try:
            found = evaluate(
                model=wrapped, tasks=[name], limit=settings.cases, task_manager=manager, bootstrap_iters=1000
            )
            return _lm_eval_report(name, found)
        except UserError:
            raise
        except Exception as error:  # its tasks load data sets and run code of their own: all kinds are raised
            if at_once == 1 or not out_of_memory(error):
                why = one_line(error)
                raise UserError(f"task {name} of lm-eval can't be run ({why})") from error
        at_once //= 2
        free_memory()


def _lm_eval_report(name: str, found: dict[str, Any]) -> UtilityReport:
    parts = [part for part in found["results"] if part != name]
    leaf = name if name in found["results"] else parts[0]
    result = found["results"][leaf]
    keys = [k for k, v in result.items() if "," in k and "_stderr," not in k and isinstance(v, float)]
    if not keys or (leaf != name and len(parts) > 1):  # a tag, or a group without a figure of its own
        raise UserError(f"task {name}: lm-eval reports no single figure for it; name one of {', '.join(sorted(parts))}")
    key = keys[0]
    metric, _, filtered = key.partition(",")
    sign = -1 if found["higher_is_better"].get(leaf, {}).get(metric) is False else 1
    samples = [  # lm-eval keeps one for each filter
        s
        for s in found.get("samples", {}).get(leaf, [])
        if isinstance(s.get(metric), int | float) and s.get("filter", filtered) == filtered
    ]
    scores = tuple(sign * float(s[metric]) for s in samples)
    value, error = sign * result[key], result.get(f"{metric}_stderr,{filtered}")
    error = float(error) if isinstance(error, float) else float("nan")
    interval = (value - 1.96 * error, value + 1.96 * error)
    if scores and abs(sum(scores) / len(scores) - value) < 1e-9:
        value, error, interval = _mean(scores)
    count = len(scores) or sum(n["effective"] for n in found["n-samples"].values())  # a group has no samples itself
    documents, replies = (
        tuple(json.dumps(s[part], ensure_ascii=False, default=str) for s in samples)
        for part in ("doc", "filtered_resps")
    )
    title = metric if sign > 0 else f"negative {metric}"
    return UtilityReport(f"lm-eval:{leaf}", title, value, error, interval, count, scores, documents, (), replies)
