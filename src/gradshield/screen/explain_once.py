"""`explain`: a missing run or row is reported before torch is imported."""

from pathlib import Path
from typing import TYPE_CHECKING

from gradshield.data.run_folder import row_of_run

if TYPE_CHECKING:
    from gradshield.screen.explanation import Explanation


def explain_run(out: Path, row: int) -> "Explanation":
    """`explain`, which is imported when the row is there."""
    row_of_run(out, row)
    from gradshield.screen.explain import explain

    return explain(out, row)
