"""The cache of results that are computed once per model: in GRADSHIELD_CACHE, else ~/.cache/gradshield."""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from gradshield.base.assets import ASSETS
from gradshield.base.storage import cache_folder, write_cache

if TYPE_CHECKING:
    from gradshield.models.load import Model  # imports torch


def cache_file(what: str, model: "Model", of: object, suffix: str = "json") -> Path:
    """The cache file of a result that depends on the model, the bundled texts and `of`."""
    texts = sorted(p for p in ASSETS.iterdir() if p.suffix in (".jsonl", ".txt", ".json"))
    assets = "".join(hashlib.sha256(p.read_bytes()).hexdigest() for p in texts)
    template = str(model.tokenizer.chat_template)
    versions = [version(name) for name in ("gradshield", "transformers", "trl")]  # which say how a row is read
    key, libraries = (
        hashlib.sha256(json.dumps(part).encode()).hexdigest()[:12] for part in ([of, assets, template], versions)
    )
    return cache_folder() / f"{what}-{model.fingerprint}-{key}-{libraries}.{suffix}"


def shipped_file(file: Path) -> Path:
    """The path at which the package may ship this cache file's content, for all versions of the libraries."""
    return ASSETS / "fitted" / f"{file.stem.rpartition('-')[0]}{file.suffix}"


def read_cache(file: Path) -> dict[str, Any] | None:
    """The JSON in the file, or the shipped version of it; None if there is none or it is unreadable."""
    for place in (file, shipped_file(file)):
        try:
            return json.loads(place.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
    return None


def cached_arrays(
    what: str, model: "Model", of: object, make: Callable[[], Mapping[str, np.ndarray]]
) -> tuple[Path, dict[str, np.ndarray]]:
    """(its file, the arrays that `make` returned at the first call, or that the package ships)."""
    file = cache_file(what, model, of, "safetensors")
    for place in (file, shipped_file(file)):
        try:
            return file, load_file(place)
        except (OSError, SafetensorError):
            continue
    try:
        made = {name: np.array(value, order="C") for name, value in make().items()}  # contiguous, also of 0 dimensions
    except KeyboardInterrupt as stop:
        if count := len(list(parts_of(file).glob("*.safetensors"))):
            stop.add_note(f"{file.parent} keeps batches of the fit: {count}")  # for the person who stopped it
        raise
    write_cache(file, save(made))
    shutil.rmtree(parts_of(file), ignore_errors=True)
    return file, made


def parts_of(file: Path) -> Path:
    """The folder of the finished parts of this cache file."""
    return file.with_suffix(".parts")


def kept_part(file: Path, make: Callable[[], Mapping[str, np.ndarray]]) -> Mapping[str, np.ndarray]:
    """The arrays in the file of a finished part; if there is none, those that `make` returns, which are saved to it."""
    try:
        return load_file(file)
    except (OSError, SafetensorError):
        made = make()
        write_cache(file, save(dict(made)))
        return made
