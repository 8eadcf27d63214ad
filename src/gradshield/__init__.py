"""GradShield: find and remove the fine-tuning rows that would make an aligned language model stop refusing.

>>> from gradshield import screen
>>> run = screen("train.jsonl", model="Qwen/Qwen2.5-7B-Instruct", out="run")
>>> run.kept  # the rows that are safe to train on
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradshield.api.functions import check, evaluate, explain, screen, tune
    from gradshield.api.run import Run
    from gradshield.base.errors import UserError
    from gradshield.base.settings import FilterSettings, FinetuneSettings, ModelSettings, RowSettings, TuneSettings
    from gradshield.defenses.base import Defense
    from gradshield.evaluation.config import EvaluationSettings
    from gradshield.scoring.base import Scorer

    __version__: str

_HOMES = {
    "check": "api.functions",
    "evaluate": "api.functions",
    "explain": "api.functions",
    "screen": "",  # the package, which can be called
    "tune": "",
    "Run": "api.run",
    "UserError": "base.errors",
    "FilterSettings": "base.settings",
    "FinetuneSettings": "base.settings",
    "ModelSettings": "base.settings",
    "RowSettings": "base.settings",
    "TuneSettings": "base.settings",
    "EvaluationSettings": "evaluation.config",
    "Scorer": "scoring.base",
    "Defense": "defenses.base",
}
__all__ = [  # noqa: RUF022 (the functions come first)
    "screen", "tune", "evaluate", "check", "explain", "Run", "UserError",
    "ModelSettings", "RowSettings", "FilterSettings", "FinetuneSettings", "TuneSettings", "EvaluationSettings",
    "Scorer", "Defense", "__version__",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Imports names on first use, so that `import gradshield` stays quick."""
    if name == "__version__":
        from importlib.metadata import version

        return version("gradshield")
    if name not in _HOMES:
        raise AttributeError(f"module 'gradshield' has no attribute {name!r}")
    home = _HOMES[name]
    return getattr(import_module(f"gradshield.{home}"), name) if home else import_module(f"gradshield.{name}")


def __dir__() -> list[str]:
    return sorted(__all__)
