"""Settings from the command line. A flag wins over --config, --config over --preset, --preset over the default."""

import inspect
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
import yaml
from pydantic import BaseModel, ValidationError

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
from gradshield.evaluation.config import EvaluationSettings

S = TypeVar("S", bound=BaseModel)
SHOWN_FIRST = {"model", "scorer", "threshold", "reference", "defense", "task", "max_asr"}  # shown first in --help
# Settings that hardly anyone changes: they have no flag.
CONFIG_ONLY = {"micro_batch", "alpha", "lora_dropout", "warmup", "schedule", "step", "literal"}
CONFIG_ONLY |= {"judge_tokens", "case_seed", "metric", "workers", "batch_tokens", "format", "probes"}
_WRITTEN = "gradshield.written"  # in a context: the --config file, and the settings that it gives
OUTPUT = "Output and settings"  # a panel of --help
REPLACED = {
    "max_asr_rise": "--max-asr +0.07",
    "utility_drop": "--min-utility base-0.02",
    "variant": "--scorer, such as --scorer fihs:normalise=cosine",
    "at_once": "`batch_tokens: …` in a file for --config, or nothing: the device decides",
}
PANELS = {
    ModelSettings: "Model",
    RowSettings: "Rows",
    FilterSettings: "Score and threshold",
    FinetuneSettings: "Fine-tuning",
    TuneSettings: "Goal and search",
    EvaluationSettings: "Evaluation",
}
_CONFIG = Annotated[
    Path | None,
    typer.Option("--config", rich_help_panel=OUTPUT, help="YAML file of settings, or the run.yaml of a run"),
]
_PRESET = Annotated[str | None, typer.Option("--preset", rich_help_panel=OUTPUT, help="named group of settings: paper")]


def flags_of(*models: type[BaseModel]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command that takes **flags a flag for each field of the settings but CONFIG_ONLY (`columns` is --map,
    repeatable), and --config; --preset where rows are scored."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
        files = {"config": _CONFIG, **({"preset": _PRESET} if FilterSettings in models else {})}
        keyword = inspect.Parameter.KEYWORD_ONLY
        more = [inspect.Parameter(n, keyword, default=None, annotation=k) for n, k in files.items()]
        for name, field in {n: f for model in models for n, f in model.model_fields.items()}.items():
            if name in CONFIG_ONLY:
                continue
            how: dict[str, Any] = {"help": field.description}
            if name not in SHOWN_FIRST:
                how["rich_help_panel"] = _panel(name, models)
            if name == "columns":
                how["help"] = f"{field.description} (prompt=COLUMN)"
                kind: Any = Annotated[list[str] | None, typer.Option("--map", **how)]
            else:
                kind = Annotated[field.annotation, typer.Option(**how)]  # type: ignore[valid-type]
            more.append(inspect.Parameter(name, keyword, default=field.default, annotation=kind))
        signature = inspect.Signature([*own, *more])
        function.__signature__ = signature  # type: ignore[attr-defined]
        function.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
        return function

    return decorate


def more_settings(*models: type[BaseModel]) -> str | None:
    """The last line of a command's help: its settings that have no flag."""
    names = sorted(CONFIG_ONLY & {name for model in models for name in model.model_fields})
    return f"More settings, for --config: {', '.join(names)}" if names else None


def settings_of(context: typer.Context, *kinds: type[S], flags: dict[str, Any]) -> list[Any]:
    """Settings of each kind. Raises UserError naming the wrong flag, or the file and the wrong key."""
    fields = {name for kind in kinds for name in kind.model_fields}
    given = {n: v for n, v in flags.items() if n in fields and _is_given(context, n)}
    if "columns" in given:
        given["columns"] = dict(_pair(item) for item in given["columns"])
    config, preset = flags.get("config"), preset_values(flags.get("preset"))
    written = _read(config, fields) if config else {}
    if unknown := sorted(written.keys() - fields):
        may = f"use {REPLACED[unknown[0]]}" if unknown[0] in REPLACED else f"it may have {', '.join(sorted(fields))}"
        raise UserError(f"{config}: unknown setting {unknown[0]!r}; {may}")
    context.meta[_WRITTEN] = (config, {name: value for name, value in written.items() if name not in given})
    values = {**preset, **written, **given}
    return [_make(kind, values, given, config) for kind in kinds]


def name_file(context: typer.Context, message: str) -> str:
    """The error's message, with the --config file in front if it begins with a setting of this file, or its value."""
    config, written = context.meta.get(_WRITTEN, (None, {}))
    for name, value in written.items():
        if message.startswith((f"{name} ", f"--{name.replace('_', '-')} ")):
            return f"{config}: {message}"
        if message.startswith(f"{value}: "):
            return f"{config}: {name}: {message}"
    return message


def _make(kind: type[S], values: dict[str, Any], given: dict[str, Any], config: Path | None) -> S:
    try:
        return kind(**{name: value for name, value in values.items() if name in kind.model_fields})
    except ValidationError as error:
        first = error.errors()[0]
        name, key = str(first["loc"][0]), ".".join(map(str, first["loc"]))
        where = f"--{name.replace('_', '-')}" if name in given or config is None else f"{config}: {key}"
        shown = "''" if first["input"] == "" else first["input"]
        raise UserError(f"{where} {shown}: {complaint(error)}") from None


def _read(config: Path, known: Collection[str]) -> dict[str, Any]:
    """The settings in the file; of a run's run.yaml without those that only other commands know."""
    try:
        found = yaml.load(config.read_text(encoding="utf-8"), _KeepsPlus)  # a SafeLoader
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # ValueError: of a date that is none
        raise UserError(f"--config {config}: can't be read ({' '.join(str(error).split())[:150]})") from None
    if not isinstance(found, dict):
        raise UserError(f"--config {config}: not a YAML mapping of settings, such as `threshold: a1`")
    if isinstance(found.get("input"), dict) and isinstance(found.get("settings"), dict):  # a run's run.yaml
        parts = [found.get(part) for part in ("settings", "finetune", "tune", "evaluation")]
        written = {n: v for part in parts if isinstance(part, dict) for n, v in part.items()}
        others = {name for kind in PANELS for name in kind.model_fields} - set(known)  # of other commands
        return {n: v for n, v in written.items() if n not in others}
    return {str(name).replace("-", "_"): value for name, value in found.items()}


class _KeepsPlus(yaml.SafeLoader):
    """YAML loader that keeps +0.07 as text, since the sign means that it is relative."""

    yaml_implicit_resolvers = {k: v for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items() if k != "+"}  # noqa: RUF012


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name not in ("DEFAULT", "DEFAULT_MAP")


def _panel(name: str, models: tuple[type[BaseModel], ...]) -> str:
    """The panel of the first class that declares the field."""
    for model in models:
        owners = [owner for owner in model.__mro__ if name in getattr(owner, "__annotations__", {})]
        if owners:
            return PANELS[owners[-1]]
    raise KeyError(name)


def _pair(item: str) -> tuple[str, str]:
    name, equals, column = item.partition("=")
    if not equals:
        raise UserError(f"--map {item}: write prompt=COLUMN")
    return name, column
