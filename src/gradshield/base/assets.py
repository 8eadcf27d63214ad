"""Where the bundled texts are."""

from pathlib import Path

ASSETS = Path(__file__).parents[1] / "assets"
