"""What the package ships about the embedded model, so that its first use needs no fitting: its alignment check and the
readouts of the default score.

    python -m gradshield.study.ship

Run it when the embedded model, the bundled texts or the score change; a test fails until it was run.
"""

import json
import shutil
from dataclasses import asdict, replace

from gradshield.base.assets import ASSETS
from gradshield.base.settings import FilterSettings
from gradshield.models.load import load_settings_model
from gradshield.scoring.cache import shipped_file
from gradshield.scoring.check import check_alignment, check_cache_file
from gradshield.scoring.reference import make_reference

SHOWN = 12  # characters of an answer that complies


def main() -> None:
    """Makes the files of assets/fitted again."""
    folder = ASSETS / "fitted"
    shutil.rmtree(folder, ignore_errors=True)
    settings = FilterSettings()
    model = load_settings_model(settings)
    check = check_alignment(model)
    reference = make_reference(model, check, settings)
    folder.mkdir()
    answers = [a if refused else a[:SHOWN] for a, refused in zip(check.answers, check.refused)]
    text = json.dumps(asdict(replace(check, answers=tuple(answers))), indent=1) + "\n"
    shipped_file(check_cache_file(model)).write_text(text, encoding="utf-8")
    for file in reference.files:
        shutil.copy(file, shipped_file(file))


if __name__ == "__main__":
    main()
