"""The user's own trainer, such as axolotl or LLaMA-Factory, run as a command."""

import shlex
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradshield.base.errors import UserError
from gradshield.base.storage import write_text
from gradshield.data.run_folder import catch_write_errors

FIELDS = ("data", "out", "model", "seed")  # that are filled in


def fill_fields(command: str, config: str | None, fields: Mapping[str, Any], folder: Path) -> tuple[list[str], str]:
    """The command's words and the text of its config, with the fields filled into both; the config's copy is to lie in
    the folder. Raises UserError for what can't be filled in, or read."""
    text, filled = {name: str(value) for name, value in fields.items()}, ""
    if config:
        try:
            filled = Path(config).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--trainer-config {config}: can't be read ({error})") from None
        for name, value in text.items():
            filled = filled.replace("{" + name + "}", value)
        text["config"] = str(folder / Path(config).name)
    try:
        words = [word.format(**text) for word in shlex.split(command)]
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        known = ", ".join("{" + name + "}" for name in text)
        raise UserError(f"--trainer-command: can't be filled in ({error}); its placeholders are {known}") from None
    if not words:
        raise UserError("--trainer-command: is empty")
    return words, filled


def run_trainer(command: str, config: str | None, fields: Mapping[str, Any], work: Path) -> dict[str, float]:
    """Runs the command, with the fields filled into it and into its config; returns {"seconds": ...}.

    The command must write an adapter or model to `work`. The filled-in config is written beside that folder. Raises
    UserError when the command can't be run, or fails.
    """
    words, filled = fill_fields(command, config, fields, work.parent)
    with catch_write_errors(work.parent):
        if config:
            write_text(work.parent / Path(config).name, filled)
        work.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    try:
        done = subprocess.run(words, check=False, stdout=2)  # stdout is for what a machine reads
    except OSError as error:
        raise UserError(f"--trainer-command: {words[0]} can't be run ({error.strerror})") from error
    if done.returncode:
        raise UserError(f"--trainer-command ended with {done.returncode}: {shlex.join(words)}")
    return {"seconds": time.monotonic() - start}


def check_trained(work: Path) -> None:
    """Raises UserError where a trainer left no adapter and no model that can be loaded."""
    config = any((work / name).exists() for name in ("adapter_config.json", "config.json"))
    if not config or not any(work.glob("*.safetensors")):
        there = ", ".join(sorted(p.name for p in work.glob("*"))[:8]) or "nothing"
        raise UserError(
            f"{work}: the trainer wrote no adapter and no model (a config and *.safetensors); it holds {there}. "
            "Fix the trainer; the same command trains again"
        )
