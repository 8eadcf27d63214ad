"""`filter` without loading the model if the run is finished or the call is wrong. Imports no torch before that is
known.
"""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from gradshield.base.settings import FilterSettings
from gradshield.data.run_folder import checksums, finished_run
from gradshield.data.summaries import FilterSummary
from gradshield.models.on_disk import disk_fingerprint
from gradshield.report.text import visible
from gradshield.screen.validate import check_settings, open_input

if TYPE_CHECKING:
    from gradshield.screen.estimate import Estimate


def filter_file(path: str, out: Path, settings: FilterSettings) -> FilterSummary:
    """The summary of the run in `out`: at once where it is finished, else when `run_filter` has finished it."""
    asked = {"settings": settings.model_dump(mode="json"), "file": checksums(settings.probes, settings.reference)}
    found = finished_run(out, path, asked, disk_fingerprint(settings), FilterSummary) if os.path.isdir(out) else None
    if found is not None:
        return found
    check_settings(settings)
    source = open_input(path, settings, out)
    if sys.stderr.isatty():
        print(f"loading {visible(settings.model)}", file=sys.stderr, flush=True)
    from gradshield.screen.filter import run_filter

    return run_filter(source, out, settings)


def estimate_file(path: str, settings: FilterSettings, out: Path | None = None) -> "Estimate":
    """`estimate`, which is imported when the call is no mistake."""
    check_settings(settings)
    source = open_input(path, settings, out)
    from gradshield.screen.estimate import estimate

    return estimate(source, settings)
