"""Checks for user errors before a model is loaded, most of them before torch is imported."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gradshield.base.errors import UserError
from gradshield.base.settings import FilterSettings, ModelSettings, RowSettings
from gradshield.data import Source, open_source
from gradshield.data.rows import expanded
from gradshield.models.files import check_local
from gradshield.scoring.base import Scorer
from gradshield.scoring.registry import SCORERS, find_scorer
from gradshield.screen.encoding import WITHOUT_REQUEST, find_layout


def check_settings(settings: FilterSettings) -> None:
    """Raises UserError for settings that contradict each other or would do nothing, an unknown scorer or option, and
    files and models that are not there."""
    given = settings.threshold in ("fixed", "share")
    if given and settings.value is None:
        raise UserError(f"--threshold {settings.threshold} needs --value")
    if not given and settings.value is not None:
        raise UserError(f"--value does nothing with --threshold {settings.threshold}: add --threshold fixed, or share")
    if settings.threshold == "share" and not 0 <= (settings.value or 0.0) <= 1:
        raise UserError(f"--value {settings.value:g}: a share must be between 0 and 1")
    SCORERS.check(settings.scorer)
    if settings.probes and (not expanded(settings.probes).exists() or expanded(settings.probes).is_dir()):
        raise UserError(f"probes {settings.probes}: no such file")
    check_places(settings)


def check_places(settings: ModelSettings) -> None:
    """Raises UserError where the model, its adapter or its chat template is a path with nothing there."""
    check_local(settings.model)
    if settings.adapter:
        check_local(settings.adapter, "adapter")
    file = settings.chat_template
    if file and (not expanded(file).exists() or expanded(file).is_dir()):
        raise UserError(f"--chat-template {file}: no such file")


def open_input(path: str, settings: FilterSettings, out: Path | None = None) -> Source:
    """The opened rows of a run in `out`. Raises UserError where they or --reference can't be read, or have no known
    layout."""
    source = open_source(path, settings.format, settings.split, out)
    find_layout(source, settings)
    if settings.reference:
        check_input(settings.reference, settings)
    return source


def check_input(path: str, settings: RowSettings, out: Path | None = None) -> None:
    """Raises UserError where a file or folder of rows can't be read, by a run in `out`, or has no known layout. Leaves
    stdin and pipes alone, which can be read only once."""
    place = expanded(path)
    if path != "-" and (place.is_file() or place.is_dir() or not place.exists()):
        find_layout(open_source(path, settings.format, settings.split, out), settings)


def find_checked(settings: FilterSettings) -> tuple[Scorer, Any]:
    """The scorer and its options. Raises UserError for settings that contradict each other, or would do nothing."""
    check_settings(settings)
    scorer, options = find_scorer(settings.scorer)
    if "request" in scorer.needs and settings.loss_on == "all":
        raise UserError(f"--loss-on all doesn't separate the request from the response; {WITHOUT_REQUEST}")
    if settings.engine == "ray" and find_spec("ray") is None:
        raise UserError("--engine ray needs Ray: pip install 'ray[data]'")
    return scorer, options
