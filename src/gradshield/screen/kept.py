"""The kept rows of a run, for its `train.py`."""

from pathlib import Path
from typing import Any

import numpy as np
import yaml

from gradshield.base.errors import UserError
from gradshield.base.settings import RowSettings
from gradshield.data import open_source
from gradshield.data.run_folder import rows_file
from gradshield.models.load import Model, load_settings_model
from gradshield.screen.encoding import encode_source


def kept_rows(run: Path) -> tuple[Model, list[dict[str, Any]]]:
    """The run's model, and `input_ids` and `labels` of its kept rows. Raises UserError if the run's
    files or the model can't be read."""
    file = run / "run.yaml"
    try:
        saved = yaml.safe_load(file.read_text(encoding="utf-8"))
        of_rows = {name: saved["settings"][name] for name in RowSettings.model_fields if name in saved["settings"]}
        settings, given = RowSettings(**of_rows), saved["input"]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"{file}: can't be read ({str(error).splitlines()[0]}); run the filter again") from None
    kept = rows_file(run, "kept")
    if kept is None:
        raise UserError(f"{run}: no kept rows; run the same filter command again")
    source = open_source(kept, "jsonl" if given["format"] == "hub" else given["format"])
    model = load_settings_model(settings)
    examples = encode_source(source, given["layout"], model, settings).examples
    labels = (np.where(e.mask, e.ids, -100) for e in examples)
    return model, [{"input_ids": e.ids.tolist(), "labels": each.tolist()} for e, each in zip(examples, labels)]
