"""`screen`, `tune`, `evaluate`, `check` and `explain` with plain arguments. Heavy imports happen inside."""

import os
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from gradshield.api.rows_in_memory import Rows, path_of
from gradshield.api.run import Run
from gradshield.base.errors import UserError
from gradshield.base.presets import preset_values
from gradshield.base.settings import (
    FilterSettings,
    FinetuneSettings,
    ModelSettings,
    RowSettings,
    TuneSettings,
    complaint,
)
from gradshield.data.summaries import EvaluationSummary, FilterSummary, TrialSummary, TuneSummary
from gradshield.evaluation.config import EvaluationSettings

if TYPE_CHECKING:
    from gradshield.screen.check_once import CheckSummary
    from gradshield.screen.explanation import Explanation
    from gradshield.tune.trainer import Finetune

PathLike = str | os.PathLike[str]


def screen(
    rows: Rows,
    *settings: FilterSettings | PathLike,
    out: PathLike = "run",
    preset: str | None = None,
    **named: Any,
) -> Run[FilterSummary]:
    """Keeps the rows that are safe to train on and quarantines the others, in the run folder `out`.

    `rows` is a path, a Hub dataset id, a `datasets.Dataset`, a pandas DataFrame or a list of dicts. Pass settings as
    keyword arguments, such as `model="Qwen/Qwen2.5-7B-Instruct"`, as `FilterSettings`, or both (keyword arguments win).
    A plain string is the model. `preset="paper"` sets everything else as in the paper. `help(FilterSettings)` lists the
    settings.

    Calling it again resumes an interrupted run, and returns a finished one immediately. Raises UserError for any error
    that the caller can fix.
    """
    from gradshield.screen.filter_once import filter_file

    (chosen,) = _chosen((FilterSettings,), settings, named, preset_values(preset))
    folder = _folder(out)
    filter_file(path_of(rows, folder), folder, chosen)
    return Run(folder)


def tune(
    rows: Rows,
    *settings: FilterSettings | FinetuneSettings | TuneSettings | EvaluationSettings | PathLike,
    out: PathLike = "tune-run",
    preset: str | None = None,
    train_with: "Finetune | None" = None,
    on_trial: Callable[[TrialSummary], None] = lambda trial: None,
    **named: Any,
) -> Run[TuneSummary]:
    """Fine-tunes on the rows that keep the model safe and useful, in the run folder `out` (algorithm 1).

    Takes rows and settings as `screen` does; the settings are those of FilterSettings, FinetuneSettings, TuneSettings
    and EvaluationSettings. `train_with(examples, folder)` replaces the fine-tuning. `on_trial` is called with each
    finished trial.

    The run's `summary.accepted` is the number of the trial whose model is in `paths["model"]`, or None if the file was
    rejected.
    """
    from gradshield.tune.command import run_tune
    from gradshield.tune.tune_once import tune_file

    kinds = (FilterSettings, FinetuneSettings, TuneSettings, EvaluationSettings)
    parts = _chosen(kinds, settings, named, preset_values(preset))
    if train_with is not None and not callable(train_with):
        raise UserError(f"train_with={train_with!r}: give a function of the rows and a folder")
    if not callable(on_trial):
        raise UserError(f"on_trial={on_trial!r}: give a function of a trial, or leave it out")
    folder = _folder(out)
    path = path_of(rows, folder)
    if train_with:
        run_tune(path, folder, *parts, trainer=train_with, on_trial=on_trial)
    else:
        tune_file(path, folder, *parts, on_trial=on_trial)
    return Run(folder)


def evaluate(
    *settings: EvaluationSettings | RowSettings | PathLike,
    out: PathLike = "eval-run",
    safety: bool = True,
    task: PathLike | None = None,
    rows: Rows | None = None,
    **named: Any,
) -> EvaluationSummary:
    """Measures how safe a model is and, given a `task` or held-out `rows`, how useful. Answers are saved in `out`.

    `task` is the name of a task, or a file of prompts and answers.
    Returns the figures of eval.yaml with their intervals, such as `.safety.asr`. Settings are those of RowSettings (the
    model, and how rows are read) and EvaluationSettings.
    """
    from gradshield.evaluation.eval_once import SUMMARY, evaluate_model

    measuring, reading = _chosen((EvaluationSettings, RowSettings), settings, named)
    folder, named_task = _folder(out), None if task is None else _path("task", task, "the name of a task, or a file")
    path = None if rows is None else path_of(rows, folder, SUMMARY)
    return evaluate_model(folder, measuring, reading, safety=safety, task=named_task, rows=path)


def check(*settings: ModelSettings | PathLike, probes: PathLike | None = None, **named: Any) -> "CheckSummary":
    """Checks whether a model is aligned enough to score rows with. `.grade` is "aligned", "weak" or "not aligned".

    Settings are those of ModelSettings. `probes` is a file of harmful requests (default: bundled).
    """
    from gradshield.screen.check_once import check_model

    (chosen,) = _chosen((ModelSettings,), settings, named)
    return check_model(chosen, None if probes is None else _path("probes", probes, "a file of harmful requests"))


def explain(run: Run | PathLike, row: int) -> "Explanation":
    """Explains the score of row number `row` (from 1) of a `screen` run: signals, tokens, modules, nearest probes."""
    if isinstance(row, bool) or not isinstance(row, int):
        raise UserError(f"row={row!r}: give the number of a row, from 1")
    folder = run.folder if isinstance(run, Run) else Path(_path("run", run, "a run, or the path of its folder"))
    from gradshield.screen.explain import explain as explain_row

    return explain_row(folder, row)


def _chosen(
    kinds: tuple[type[BaseModel], ...],
    given: tuple[BaseModel | PathLike, ...],
    named: Mapping[str, Any],
    preset: Mapping[str, Any] | None = None,
) -> list[Any]:
    """Settings of each kind. Keyword arguments override the settings objects, which override the preset, which
    overrides the defaults. Raises UserError naming the wrong setting.
    """
    fields = {name for kind in kinds for name in kind.model_fields}
    for name in named.keys() - fields:
        meant = get_close_matches(name, [*fields, *(["preset"] if preset is not None else [])], 1)
        raise UserError(
            f"unknown setting {name!r}; {f'did you mean {meant[0]!r}?' if meant else f'see help({kinds[0].__name__})'}"
        )
    seen = set[str]()
    for each in given:
        kind = "model" if isinstance(each, str | os.PathLike) else type(each).__name__
        if kind in seen:
            raise UserError(f"{kind} is given twice; pass it once")
        seen.add(kind)
        if isinstance(each, str | os.PathLike):
            named = {"model": each, **named}
        elif type(each) not in kinds:
            raise UserError(f"{type(each).__name__} is not accepted here; pass {_names(kinds)}")
    found = []
    for kind in kinds:
        base = next((each for each in given if isinstance(each, kind) and type(each) is kind), kind())
        own = {name: getattr(base, name) for name in base.model_fields_set}
        values = {**(preset or {}), **own, **{name: _text(value) for name, value in named.items()}}
        try:
            found.append(kind(**{name: value for name, value in values.items() if name in kind.model_fields}))
        except ValidationError as error:
            first = error.errors()[0]
            raise UserError(f"{first['loc'][0]}={first['input']!r}: {complaint(error)}") from None
    return found


def _folder(out: PathLike) -> Path:
    """The run folder. Raises UserError for what can't be one."""
    return Path(_path("out", out, "the path of a folder"))


def _path(name: str, value: Any, what: str) -> str:
    """The path as text. Raises UserError for what is none, or empty."""
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise UserError(f"{name}={value!r}: give {what}")
    return os.fspath(value)


def _names(kinds: tuple[type[BaseModel], ...]) -> str:
    return ", ".join(kind.__name__ for kind in kinds)


def _text(value: Any) -> Any:
    """The setting as text, since callers may pass a Path."""
    return os.fspath(value) if isinstance(value, os.PathLike) else value
