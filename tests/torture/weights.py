"""Hostile configs and weights."""

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torture.changes import CASES, PICKLE, Change, case, filled, setting, tensors, without, written

for value in (0, -1, 1, 2, 5, 10**6, 10**12, "3", None, 2.5, [3], True):
    setting("llama", "config.json", num_hidden_layers=value)
for key in ("hidden_size", "vocab_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"):
    for value in (0, -4, 33, 10**9, 10**18, "x", None):
        setting("llama", "config.json", **{key: value})
for key, values in {
    "max_position_embeddings": (0, 1, 8, -5, 10**15, None, "x"),
    "rope_parameters": ({}, {"rope_type": "no such"}, {"rope_type": "yarn", "factor": 0}, "x", {"rope_theta": 0}),
    "rms_norm_eps": (0, -1, float("nan"), 1e300, "x"),
    "hidden_act": ("no such", 3, "__import__"),
    "model_type": ("no such", "", None, 7, "bert", "gpt2", "t5", "clip", "mixtral", "mamba", "whisper"),
    "architectures": ([], ["NoSuch"], "x", ["BertModel"]),
    "dtype": ("no such", "int8", "float64", 7, "float8_e4m3fn", "complex64"),
    "auto_map": ({"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}, {"AutoModelForCausalLM": 3}, "x"),
    "quantization_config": (
        {},
        {"quant_method": "no such"},
        {"quant_method": "gptq", "bits": 4},
        {"load_in_4bit": True},
    ),
    "tie_word_embeddings": (False, None, "no"),
    "eos_token_id": (10**9, -1, [], [1, "x"], "x"),
    "pad_token_id": (10**9, -7, "x"),
    "bos_token_id": (10**9, None),
    "transformers_weights": ("pytorch_model.bin", "../x.safetensors", 3),
    "layer_types": (["no such"] * 3, ["full_attention"], 7),
    "attention_bias": (True, "x"),
    "mlp_bias": (True,),
    "pretraining_tp": (0, 10**9),
    "attention_dropout": (2.0, -1),
    "attn_implementation": ("no such",),
    "num_experts": (10**9,),
}.items():
    for value in values:
        setting("llama", "config.json", **{key: value})
for key, values in {
    "n_positions": (1, 4, 16, 10**7, 0),
    "n_embd": (31, 0, 10**7),
    "n_layer": (0, 7, 10**9),
    "n_head": (0, 3, 10**6),
    "activation_function": ("no such",),
    "layer_norm_epsilon": (float("inf"), "x"),
    "add_cross_attention": (True,),
    "n_inner": (7, 10**9),
    "scale_attn_weights": ("x",),
}.items():
    for value in values:
        setting("gpt2", "config.json", **{key: value})
for value in (0, 10**9, [1, 2], "x", None, -3):
    setting("llama", "generation_config.json", eos_token_id=value)
setting("llama", "generation_config.json", max_length=10**12, do_sample="x", cache_implementation="no such")
setting(
    "llama",
    "generation_config.json",
    num_beams=10**6,
    pad_token_id=10**9,
    forced_bos_token_id=[],
    watermarking_config=3,
)


for part in ("layers.1.", "layers.2.mlp", "embed_tokens", "model.norm", "q_proj", "input_layernorm", "layers."):
    CASES[f"llama: without {part}"] = ("llama", without(part))
for part in ("wte", "wpe", "h.1.", "ln_f", "c_attn.bias", "transformer."):
    CASES[f"gpt2: without {part}"] = ("gpt2", without(part))


for number in (float("nan"), float("inf"), 3e38, 0.0):
    CASES[f"llama: a tensor of {number}"] = ("llama", filled(number))
    CASES[f"gpt2: a tensor of {number}"] = ("gpt2", filled(number))


@case("llama")
@tensors
def all_weights_huge(content: dict, draw: random.Random) -> None:
    for tensor in content.values():
        tensor.mul_(1e19)


@case("llama")
@tensors
def prefixed(content: dict, draw: random.Random) -> dict:
    return {f"module.{k}": v for k, v in content.items()}


@case("llama")
@tensors
def prefix_missing(content: dict, draw: random.Random) -> dict:
    return {k.removeprefix("model."): v for k, v in content.items()}


@case("llama")
@tensors
def one_more_layer(content: dict, draw: random.Random) -> dict:
    return content | {k.replace("layers.2", "layers.3"): v.clone() for k, v in content.items() if "layers.2" in k}


@case("llama")
@tensors
def odd_names(content: dict, draw: random.Random) -> dict:
    return content | {
        "\x1b[2J\n\nevil": next(iter(content.values())).clone(),
        "x" * 10_000: content["model.norm.weight"].clone(),
    }


@case("llama")
@tensors
def another_shape(content: dict, draw: random.Random) -> None:
    key = draw.choice(sorted(content))
    content[key] = content[key][:-1].clone()


@case("llama")
@tensors
def transposed(content: dict, draw: random.Random) -> None:
    key = "model.layers.0.mlp.up_proj.weight"
    content[key] = content[key].T.clone()


@case("llama", "an empty tensor", "an empty tensor again")
@tensors
def emptied(content: dict, draw: random.Random) -> None:
    key = draw.choice(sorted(content))
    content[key] = content[key].flatten()[:0].clone()


@case("llama")
@tensors
def integers(content: dict, draw: random.Random) -> None:
    import torch

    key = draw.choice(sorted(content))
    content[key] = content[key].to(torch.int32)


@case("llama")
@tensors
def no_tensor(content: dict, draw: random.Random) -> dict:
    import torch

    return {"x": torch.zeros(1)}


@case("llama")
@tensors
def untied_head(content: dict, draw: random.Random) -> dict:
    return content | {"lm_head.weight": content["model.embed_tokens.weight"].neg()}


@case("llama")
@tensors
def complex_numbers(content: dict, draw: random.Random) -> None:
    import torch

    content["model.norm.weight"] = content["model.norm.weight"].to(torch.complex64)


def header(change: Callable[[dict], Any]) -> Change:
    """The header of the safetensors file, changed as JSON, with the data left as it is."""

    def apply(folder: Path, draw: random.Random) -> None:
        file = folder / "model.safetensors"
        data = file.read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        content = json.loads(data[8 : 8 + size])
        text = json.dumps(change(content) or content).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])

    return apply


def _norm(**values: Any) -> Change:
    return header(lambda content: content["model.norm.weight"].update(values))


for field, values in {
    "shape": ([10**12], [-32], [0], [], "x", [2**63, 2**63], [32, 1]),
    "data_offsets": ([0, 10**12], [5, 1], [-1, 10], "x", [0, 0]),
    "dtype": ("F8_E4M3", "no such", 3, "BOOL"),
}.items():
    for value in values:
        CASES[f"llama: header {field} = {value}"] = ("llama", _norm(**{field: value}))
CASES["llama: header of a list"] = ("llama", header(lambda content: [content]))
CASES["llama: header's metadata of numbers"] = ("llama", header(lambda c: c | {"__metadata__": {"format": 3}}))
CASES["llama: header's metadata says tf"] = ("llama", header(lambda c: c | {"__metadata__": {"format": "tf"}}))


for label, content in {
    "empty": b"",
    "a pickle": PICKLE,
    "a zip": b"PK\x03\x04" + bytes(99),
    "an LFS pointer": b"version https://git-lfs.github.com/spec/v1\n",
    "a GGUF": b"GGUF" + bytes(99),
    "a huge header": struct.pack("<Q", 2**62) + b"{}",
    "text": b"hello",
    "nothing but {}": struct.pack("<Q", 2) + b"{}",
}.items():
    CASES[f"llama: weights are {label}"] = ("llama", written("model.safetensors", content))
for file in (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
):
    for label, content in {
        "empty": b"",
        "null": b"null",
        "a list": b"[]",
        "torn": b'{"model_type": "llama"',
        "latin": b'{"a": "caf\xe9"}',
        "deep": b"[" * 50_000,
        "a number": b"1e999",
        "NUL": bytes(64),
    }.items():
        CASES[f"llama: {file} is {label}"] = ("llama", written(file, content))
for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", "generation_config.json"):
    CASES[f"llama: no {file}"] = ("llama", lambda folder, _, f=file: (folder / f).unlink())


@case("llama")
def config_is_a_folder(folder: Path, draw: random.Random) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()


@case("llama")
def weights_are_a_folder(folder: Path, draw: random.Random) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()


def indexed(change: Callable[[Path, dict], Any]) -> Change:
    """The weights in one shard with an index, which `change` gets."""

    def apply(folder: Path, draw: random.Random) -> None:
        from safetensors.torch import load_file

        keys = list(load_file(folder / "model.safetensors"))
        shard = "model-00001-of-00001.safetensors"
        (folder / "model.safetensors").rename(folder / shard)
        index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(keys, shard)}
        index = change(folder, index) or index
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return apply


def _one_in(name: Any) -> Change:
    def change(folder: Path, index: dict) -> None:
        (folder / "pytorch_model.bin").write_bytes(PICKLE)
        index["weight_map"]["model.norm.weight"] = name

    return indexed(change)


CASES["llama: an index, and nothing wrong"] = ("llama", indexed(lambda folder, index: None))
for name in (
    "pytorch_model.bin",
    "../x.safetensors",
    "/etc/passwd",
    "none.safetensors",
    3,
    None,
    "a/b.safetensors",
    "",
):
    CASES[f"llama: an index that names {name!r}"] = ("llama", _one_in(name))
for label, broken in {
    "empty": {},
    "no map": {"metadata": {}},
    "a list": [],
    "an empty map": {"weight_map": {}},
}.items():
    CASES[f"llama: an index that is {label}"] = ("llama", indexed(lambda folder, index, b=broken: b or {"x": 1}))
CASES["llama: an index without metadata"] = ("llama", indexed(lambda f, index: {"weight_map": index["weight_map"]}))


@case("llama")
@indexed
def a_pickled_shard(folder: Path, index: dict) -> None:
    next(folder.glob("*.safetensors")).write_bytes(PICKLE)


@case("llama")
@indexed
def a_tensor_in_two_shards(folder: Path, index: dict) -> None:
    shutil.copy(next(folder.glob("*.safetensors")), folder / "other.safetensors")
    index["weight_map"]["model.norm.weight"] = "other.safetensors"


@case("llama")
@indexed
def an_index_with_a_tensor_too_many(folder: Path, index: dict) -> None:
    index["weight_map"]["model.layers.9.weight"] = "model-00001-of-00001.safetensors"


@case("llama")
def only_a_pickle(folder: Path, draw: random.Random) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(PICKLE)


@case("llama")
def a_distributed_checkpoint(folder: Path, draw: random.Random) -> None:
    (folder / "model.safetensors").rename(folder / "shard-00001-model-00001-of-00001.safetensors")
    (folder / ".metadata").write_bytes(PICKLE)
