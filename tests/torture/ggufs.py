"""Hostile GGUF files."""

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import CHATML, tiny_tokenizer

from torture.changes import CASES, Change
from torture.tokenizer import DOUBLING, LOOP


def bytes_of(change: Callable[[bytearray, random.Random], Any]) -> Change:
    def apply(folder: Path, draw: random.Random) -> None:
        data = bytearray((folder / "model.gguf").read_bytes())
        data = change(data, draw) or data
        (folder / "model.gguf").write_bytes(bytes(data))

    return apply


for share in (0.0, 0.001, 0.01, 0.1, 0.3, 0.5, 0.9, 0.999):
    CASES[f"gguf: cut to {share}"] = ("gguf", bytes_of(lambda data, _, s=share: data[: int(len(data) * s)]))
for offset, form, values in (
    (0, "<4s", (b"GGML", b"\x80\x04ab", b"PK\x03\x04", b"fugg")),
    (4, "<I", (0, 1, 2, 4, 2**31, 0x03000000)),
    (8, "<Q", (0, 1, 5, 2**40, 2**63)),
    (16, "<Q", (0, 1, 5, 2**40, 2**63)),
    (24, "<Q", (0, 2**40, 2**63)),
):
    for value in values:
        CASES[f"gguf: {value!r} at {offset}"] = (
            "gguf",
            bytes_of(lambda data, _, o=offset, f=form, v=value: struct.pack_into(f, data, o, v)),
        )


def gguf(label: str, leave: str = "", more: tuple[str, ...] = (), **values: Any) -> None:
    """A GGUF written with these values (keys with __ for a dot), without tensors that contain `leave`."""
    changed = {key.replace("__", "."): value for key, value in values.items()}
    CASES[f"gguf: {label}"] = ("gguf", lambda folder, _: write_gguf(folder / "model.gguf", changed, leave, more))


gguf("the first of three parts", split__no=0, split__count=3)
gguf("a part, and half of the layers", "blk.2", split__no=0, split__count=2)
for leave in ("token_embd", "output_norm", "blk.1.", "attn_q", "blk."):
    gguf(f"without {leave}", leave)
gguf("a tensor too many", more=("blk.7.attn_q.weight",))
gguf("an unknown tensor", more=("evil",))
gguf("rope factors", more=("rope_freqs.weight",))
for number in (0, 1, 2, 9, 2**31):
    gguf(f"{number} layers", llama__block_count=number)
for key in (
    "embedding_length",
    "feed_forward_length",
    "attention__head_count",
    "attention__head_count_kv",
    "context_length",
    "vocab_size",
    "rope__dimension_count",
):
    for number in (0, 1, 33, 2**31):
        gguf(f"{key} {number}", **{f"llama__{key}": number})
for architecture in ("no such", "qwen2", "gpt2", "mamba", "t5", "falcon", "qwen35", "lfm2", "", "gemma3"):
    gguf(f"architecture {architecture}", general__architecture=architecture)
for number in (0, 1, 3, 64, 2**30):
    gguf(f"alignment {number}", general__alignment=number)
for number in (0, 10**6, 2**31):
    gguf(f"eos {number}", tokenizer__ggml__eos_token_id=number)
for name in ("no such", "llama", "bert", ""):
    gguf(f"tokenizer {name}", tokenizer__ggml__model=name)
for template in ("", LOOP, "{{", "always the same", DOUBLING):
    gguf(f"template {template[:20]}", tokenizer__chat_template=template)
gguf("tokens of numbers", tokenizer__ggml__tokens=[1, 2, 3])
gguf("fewer tokens", tokenizer__ggml__tokens=["a", "b"])
gguf("no merges", tokenizer__ggml__merges=[])
CASES["gguf: named as safetensors"] = (
    "gguf",
    lambda folder, _: ["--model", str((folder / "model.gguf").rename(folder / "model.safetensors"))],
)
CASES["gguf: its folder"] = ("gguf", lambda folder, _: ["--model", str(folder)])


def write_gguf(path: Path, values: dict[str, Any], leave: str = "", more: tuple[str, ...] = ()) -> None:
    """A tiny Llama as GGUF."""
    import numpy as np
    from gguf import GGUFWriter

    words = tiny_tokenizer()
    backend = json.loads(words.backend_tokenizer.to_str())["model"]
    width, layers, size = 32, 3, len(words)
    metadata: dict[str, Any] = {
        "llama.block_count": layers,
        "llama.context_length": 512,
        "llama.embedding_length": width,
        "llama.feed_forward_length": 64,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 8,
        "llama.rope.freq_base": 10_000.0,
        "llama.vocab_size": size,
        "llama.attention.layer_norm_rms_epsilon": 1e-6,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": sorted(words.get_vocab(), key=words.get_vocab().__getitem__),
        "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in backend["merges"]],
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.chat_template": CHATML,
    } | values
    writer = GGUFWriter(path, metadata.pop("general.architecture", "llama"))
    for key, value in metadata.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value) if value else None
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    shapes = {"token_embd.weight": (size, width), "output_norm.weight": (width,)}
    for n in range(layers):
        shapes |= {f"blk.{n}.{norm}.weight": (width,) for norm in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{n}.{name}.weight": (width, width) for name in ("attn_q", "attn_output")}
        shapes |= {f"blk.{n}.{name}.weight": (16, width) for name in ("attn_k", "attn_v")}
        shapes |= {f"blk.{n}.{name}.weight": (64, width) for name in ("ffn_gate", "ffn_up")}
        shapes[f"blk.{n}.ffn_down.weight"] = (width, 64)
    shapes |= dict.fromkeys(more, (4,))
    draw = np.random.default_rng(0)
    for name, shape in shapes.items():
        if not leave or leave not in name:
            writer.add_tensor(name, draw.normal(0.5 if len(shape) == 1 else 0, 0.2, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
