"""What tells one model from another: every byte that is loaded, and how the tokenizer that results reads text."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def fingerprint_of(files: Sequence[Path], quantize: str | None, net: Any, tokenizer: Any) -> str:
    """sha256 (16 hex digits) over the files of weights, configs, tokenizers, templates and adapters, in their order,
    and over the tokenizer and the chat template in use.

    Every byte counts: an edit of a few matrices in the middle can be all that a refusal hung on.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    reading = f"{tokenizer.chat_template} {backend.to_str() if backend else tokenizer.get_vocab()}"
    reading += f" {tokenizer.special_tokens_map}"  # which templates read
    digest = hashlib.sha256(f"{net.config.model_type} {net.dtype} {quantize} {reading}".encode())
    for file in files:
        with file.open("rb") as stream:
            digest.update(f"{file.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}".encode())
    return digest.hexdigest()[:16]
