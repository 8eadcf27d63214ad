"""What tells one model from another: its weights, their configs, its tokenizer and its chat template."""

import hashlib
from pathlib import Path
from typing import Any


def fingerprint_of(
    name: str, source: dict[str, Any], adapters: list[str], quantize: str | None, net: Any, tokenizer: Any
) -> str:
    """sha256 (16 hex digits) over the files of weights and their configs (or the Hub commit), and the tokenizer.

    Every byte counts: an edit of a few matrices in the middle can be all that a refusal hung on.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    reading = f"{tokenizer.chat_template} {backend.to_str() if backend else tokenizer.get_vocab()}"
    reading += f" {tokenizer.special_tokens_map}"  # which templates read
    digest = hashlib.sha256(f"{net.config.model_type} {net.dtype} {quantize} {reading}".encode())
    folder = Path(source["pretrained_model_name_or_path"])
    files = [folder / source["gguf_file"]] if "gguf_file" in source else sorted(folder.glob("*.safetensors"))
    if not files:
        digest.update(f"{name} {getattr(net.config, '_commit_hash', None)}".encode())
    for adapter in adapters:
        at = Path(adapter) if Path(adapter).is_dir() else _on_hub(adapter)
        found = sorted(at.glob("*.safetensors")) if at else []
        files += [*found, at / "adapter_config.json"] if at and found else []
        digest.update((Path(adapter).name if found else adapter).encode())
    code = sorted(folder.glob("*.py")) if source.get("trust_remote_code") else []
    for file in (*files, folder / "config.json", *code):
        if file.is_file():
            with file.open("rb") as stream:
                digest.update(f"{file.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}".encode())
    return digest.hexdigest()[:16]


def _on_hub(adapter: str) -> Path | None:
    """Where the Hub's cache has the adapter that was just loaded."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        file = try_to_load_from_cache(adapter, "adapter_config.json")
    except HFValidationError:  # no id of the Hub's
        return None
    return Path(file).parent if isinstance(file, str) else None
