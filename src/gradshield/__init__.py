"""GradShield: find and remove the fine-tuning rows that would teach an aligned language model to stop refusing.

from gradshield import FilterSettings, run_filter
summary = run_filter("train.jsonl", Path("run"), FilterSettings())
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradshield.base.errors import UserError
    from gradshield.base.settings import FilterSettings
    from gradshield.models.load import Model, load_model
    from gradshield.screen.filter import run_filter

__all__ = ["FilterSettings", "Model", "UserError", "load_model", "run_filter"]
_HOMES = {
    "UserError": "base.errors",
    "FilterSettings": "base.settings",
    "run_filter": "screen.filter",
    "Model": "models.load",
    "load_model": "models.load",
}


def __getattr__(name: str) -> Any:
    """Imports on first use, so that `import gradshield` stays light."""
    if name not in _HOMES:
        raise AttributeError(f"module 'gradshield' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"gradshield.{_HOMES[name]}"), name)
