"""A model's fingerprint: a digest of every byte that is loaded, and of how its tokenizer reads text."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gradshield.base.errors import UserError, first_line


def fingerprint_of(files: Sequence[Path], quantize: str | None, net: Any, tokenizer: Any) -> str:
    """sha256 (16 hex digits) over the files of weights, configs, tokenizers, templates and adapters, in their order,
    and over the tokenizer and the chat template in use. Raises UserError for a file that can't be read.

    Every byte counts: an edit of a few matrices can be enough to remove refusals.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    reading = f"{tokenizer.chat_template} {backend.to_str() if backend else tokenizer.get_vocab()}"
    reading += f" {tokenizer.special_tokens_map}"  # which templates read
    digest = hashlib.sha256(f"{net.config.model_type} {net.dtype} {quantize} {reading}".encode())
    for file in files:
        try:
            with file.open("rb") as stream:
                digest.update(f"{file.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}".encode())
        except OSError as error:
            raise UserError(f"{file}: can't be read ({first_line(error)}); remove it") from None
    return digest.hexdigest()[:16]
