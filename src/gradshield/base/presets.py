"""Named groups of settings. `paper`: the choices of Hu et al. (arXiv 2605.14194), where they state them."""

from collections.abc import Mapping
from typing import Any

from gradshield.base.errors import UserError

PAPER: dict[str, Any] = {
    "scorer": "fihs:normalise=none,s=paper",  # eq. 4 and 5
    "threshold": "a1",  # algorithm A1
    "alpha": 10.0,
    "defense": "gradshield",
    "start": "paper",  # algorithm 1: train on everything first
    "literal": True,  # algorithm 1, line 12, as printed
    "method": "lora",
    "lora_rank": 8,
    "lora_alpha": 32,
    "batch": 8,
    "epochs": 3,
    "learning_rate": 1e-4,
    "max_new_tokens": 32,
}
PRESETS = {"paper": PAPER}


def preset_values(name: str | None) -> Mapping[str, Any]:
    """The settings of a preset; none if `name` is None. Raises UserError for an unknown name."""
    if name is None:
        return {}
    if not isinstance(name, str) or name not in PRESETS:
        raise UserError(f"preset {name!r}: no such preset; choose from: {', '.join(PRESETS)}")
    return PRESETS[name]
