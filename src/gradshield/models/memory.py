"""How many tokens a batch takes on a device, and memory that is kept between batches."""

import ctypes
import sys
from contextlib import suppress
from typing import Any

import torch

CPU_TOKENS = 512  # measured best for rows of 130 to 450 tokens; a longer row is a batch of its own (docs/log.md)
MAX_TOKENS = 8192  # as measured on an H200; beyond it, nothing is won
PER_TOKEN = 32  # numbers of the hidden size that scoring keeps of a token in each layer, roughly
_MALLOC_LIMIT = 2**31 - 1  # bytes: no single tensor of a batch is larger


def automatic_tokens(net: Any, device: torch.device) -> int:
    """Tokens of a batch, padding included: `CPU_TOKENS` on a CPU. On a GPU up to `MAX_TOKENS`, as many
    as have activations of at most half of the memory beside the weights."""
    if device.type != "cuda":
        return CPU_TOKENS
    room = torch.cuda.get_device_properties(device).total_memory - net.get_memory_footprint()
    config = net.config.get_text_config()
    token = PER_TOKEN * config.hidden_size * config.num_hidden_layers * net.dtype.itemsize
    return max(CPU_TOKENS, min(MAX_TOKENS, room // (2 * token)))


def keep_memory() -> None:
    """Has glibc keep freed memory for the next batch instead of returning it, which costs a page fault for each page.

    Does nothing where the C library is not glibc.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(-3, _MALLOC_LIMIT)  # M_MMAP_THRESHOLD
            mallopt(-1, _MALLOC_LIMIT)  # M_TRIM_THRESHOLD


def return_memory() -> None:
    """Returns freed memory that `keep_memory` has kept to the system; later code needs blocks of other sizes."""
    import pyarrow

    pyarrow.default_memory_pool().release_unused()
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
