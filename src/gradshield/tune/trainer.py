"""One training of a search: by us, by the user's function, or by the user's command; and the model that it left."""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gradshield.base.errors import UserError
from gradshield.base.settings import FilterSettings
from gradshield.base.storage import read_json, write_text
from gradshield.data.encode import Example
from gradshield.data.run_folder import catch_write_errors
from gradshield.defenses.train import with_prompt
from gradshield.models.load import Model, load_settings_model, parked_on_cpu
from gradshield.training.external import check_trained, run_trainer
from gradshield.tune.pool import Pool

Finetune = Callable[[Sequence[Example], Path], Mapping[str, float] | str | Path | None]
"""(rows to train on, folder for the adapter or model) → figures such as {"steps": ..., "seconds": ...}, or the folder
where the adapter is instead. An example holds the tokens and the mask of a row, and its number in the file, from 0."""


@dataclass(frozen=True)
class Trainer:
    """How the trials of one run are trained."""

    pool: Pool
    own: Finetune | None  # the user's function
    train: Callable[..., Mapping[str, float]]  # `finetune`, in all processes

    def run(self, chosen: np.ndarray, folder: Path, given: Sequence[Example] | None = None) -> int:
        """Leaves the trained model in `folder / "model"`; returns the optimizer steps, 0 where they are not known.

        `chosen` are indices of examples; `given` are these and what a defense adds. What an earlier call left is not
        trained again.
        """
        done, work, out = folder / "figures.json", folder / "training", self.pool.out
        if not done.exists():
            with catch_write_errors(out):
                folder.mkdir(parents=True, exist_ok=True)
            examples = given or [self.pool.encoded.examples[n] for n in chosen]
            if self.own or self.pool.tuning.trainer_command:
                with parked_on_cpu(self.pool.model):  # they load a model of their own
                    figures = self._by_user(examples, chosen, work)
            else:
                with catch_write_errors(out):
                    figures = self.train(examples, work)
            with catch_write_errors(out):
                write_text(done, json.dumps(_numbers(figures)))
        if work.exists():
            with catch_write_errors(out):
                shutil.rmtree(folder / "model", ignore_errors=True)
                os.replace(work, folder / "model")
        return int(read_json(done, dict[str, float | None]).get("steps") or 0)

    def _by_user(self, examples: Sequence[Example], chosen: np.ndarray, work: Path) -> Mapping[str, float]:
        """By the user's function, or by the command on a file of the rows, verbatim; nothing is recorded where they
        leave no model that can be loaded."""
        if self.own:
            made = self.own(examples, work)
            if isinstance(made, str | os.PathLike) and not Path(made).is_dir():
                raise UserError(f"the trainer says that its model is in {made}, which is not a folder")
            if isinstance(made, str | os.PathLike) and Path(made).resolve() != work.resolve():
                with catch_write_errors(self.pool.out):
                    shutil.copytree(made, work, dirs_exist_ok=True)
            figures = made if isinstance(made, Mapping) else {}
        else:
            figures = self._by_command(str(self.pool.tuning.trainer_command), chosen, work)
        check_trained(work)
        return figures

    def _by_command(self, command: str, chosen: np.ndarray, work: Path) -> Mapping[str, float]:
        data = work.parent / "data"
        self.pool.write(data, chosen)
        kept = next(p for p in sorted(data.iterdir()) if p.name.startswith("kept"))
        fields = {"data": kept, "out": work, "model": self.pool.settings.model, "seed": self.pool.training.seed}
        return run_trainer(command, self.pool.tuning.trainer_config, fields, work)


def _numbers(figures: Mapping[str, Any]) -> dict[str, float]:
    """What of a trainer's figures is a number; a user's may be arrays, tensors, or anything. Not the seconds, which
    differ when a training was resumed."""
    found = {}
    for name, value in figures.items():
        if name == "seconds":
            continue
        with suppress(TypeError, ValueError, RuntimeError):
            found[str(name)] = float(value)
    return found


def load_trained(settings: FilterSettings, folder: Path) -> Model:
    """What a trial left: its adapter on top of the settings' model (and adapter), or a whole model."""
    if (folder / "adapter_config.json").exists():
        return with_prompt(load_settings_model(settings, over=str(folder)), folder)
    return with_prompt(load_settings_model(settings.model_copy(update={"model": str(folder), "adapter": None})), folder)
