"""Defenses by name. A new file in this folder registers itself; `DEFENSES.register` adds one from elsewhere."""

from typing import TYPE_CHECKING, Any

from pydantic import Field

from gradshield.base.registry import NoOptions, Registry

if TYPE_CHECKING:
    from gradshield.defenses.base import Defense  # imports torch

_HERE = "gradshield.defenses"


class SafeRows(NoOptions):
    """Options of a defense that trains on safe rows, too. It is here as this module imports no torch."""

    safe: str | None = Field(default=None, description="file of harmful requests that are refused (default: bundled)")
    count: int = Field(default=100, ge=1, description="safe rows that are used")


DEFENSES: "Registry[Defense]" = Registry(
    "defense",
    "DEFENSE",
    {"gradshield": f"{_HERE}.gradshield", "none": f"{_HERE}.none", "filter": f"{_HERE}.filtering"},
    _HERE,
    skip=("base", "registry", "train", "filtering", "aligned"),
)


def find_defense(text: str) -> "tuple[Defense, Any]":
    """The defense and its options for NAME[:key=value,…]. Raises UserError naming what is wrong."""
    return DEFENSES.find(text)
