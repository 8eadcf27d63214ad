"""Hostile adapters."""

import json
import random
import shutil
import struct
from pathlib import Path

from conftest import CHATML, tiny_tokenizer

from torture.changes import CASES, PICKLE, case, edit, filled, setting, tensors, without, written
from torture.tokenizer import LOOP

for key, values in {
    "peft_type": (
        "no such",
        None,
        3,
        "PROMPT_TUNING",
        "PREFIX_TUNING",
        "P_TUNING",
        "IA3",
        "ADALORA",
        "XLORA",
        "BOFT",
        "VERA",
    ),
    "r": (0, -1, 4, 64, 10**9, "x", None),
    "lora_alpha": (0, float("nan"), "x", 1e300, None),
    "target_modules": ([], "no such", ["no such"], "all-linear", "(a+)+$", 3, None, ["lm_head"], ["embed_tokens"]),
    "base_model_name_or_path": ("", None, 3, "no/such", "/nowhere", "."),
    "bias": ("all", "no such", 3),
    "use_dora": (True,),
    "use_rslora": (True, "x"),
    "task_type": ("SEQ_CLS", "no such", None, "SEQ_2_SEQ_LM"),
    "modules_to_save": (["lm_head"], ["embed_tokens"], "x", ["no such"]),
    "layers_to_transform": ([0], [99], "x"),
    "rank_pattern": ({"q_proj": 10**9}, {"q_proj": 3}, "x"),
    "layer_replication": ([[0, 3], [0, 3]], "x"),
    "megatron_config": ({"a": 1},),
    "init_lora_weights": ("pissa", "no such", "loftq", "eva"),
    "auto_mapping": ({"base_model_class": "x", "parent_library": "os"},),
    "trainable_token_indices": ([0, 1], {"embed_tokens": [10**9]}),
    "ensure_weight_tying": (True,),
    "fan_in_fan_out": (True,),
    "peft_version": (None, "99"),
    "no_such_key": (1,),
    "runtime_config": ({"x": 1},),
    "target_parameters": (["no such"],),
    "alpha_pattern": ({"q_proj": float("nan")},),
    "exclude_modules": (".*",),
}.items():
    for value in values:
        setting("adapter", "adapter_config.json", **{key: value})
for label, content in {"empty": b"", "a pickle": PICKLE, "torn": struct.pack("<Q", 99) + b"{"}.items():
    CASES[f"adapter: weights are {label}"] = ("adapter", written("adapter_model.safetensors", content))
for part in ("layers.1.", "lora_A", "lora_B", "q_proj"):
    CASES[f"adapter: without {part}"] = ("adapter", without(part))
for number in (float("nan"), float("inf"), 3e38):
    CASES[f"adapter: a tensor of {number}"] = ("adapter", filled(number))


@case("adapter")
def its_own_base(folder: Path, draw: random.Random) -> None:
    edit(folder / "adapter_config.json", lambda c: c | {"base_model_name_or_path": str(folder)})


@case("adapter")
def a_circle_of_two(folder: Path, draw: random.Random) -> None:
    other = folder / "other"
    other.mkdir()
    shutil.copy(folder / "adapter_model.safetensors", other)
    edit(folder / "adapter_config.json", lambda c: c | {"base_model_name_or_path": str(other)})
    (other / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(folder), "peft_type": "LORA"})
    )


@case("adapter")
@tensors
def resized_vocabulary(content: dict, draw: random.Random) -> dict:
    import torch

    return content | {"base_model.model.model.embed_tokens.weight": torch.zeros(300, 32)}


@case("adapter")
@tensors
def emptied_by_zero3(content: dict, draw: random.Random) -> dict:
    return {k: v.flatten()[:0].clone() for k, v in content.items()}


@case("adapter")
@tensors
def another_rank(content: dict, draw: random.Random) -> None:
    key = next(k for k in content if "lora_A" in k)
    content[key] = content[key][:3].clone()


@case("adapter")
@tensors
def left_over(content: dict, draw: random.Random) -> dict:
    import torch

    return content | {"base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": torch.zeros(4, 32)}


@case("adapter")
def only_a_pickled_adapter(folder: Path, draw: random.Random) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(PICKLE)


@case("adapter")
def a_tokenizer_of_its_own_too_large(folder: Path, draw: random.Random) -> None:
    tiny = tiny_tokenizer()
    tiny.add_tokens([f"<{n}>" for n in range(50)])
    tiny.save_pretrained(folder)


@case("adapter")
def a_template_of_its_own_that_does_not_end(folder: Path, draw: random.Random) -> None:
    (folder / "chat_template.jinja").write_text(LOOP + CHATML)
