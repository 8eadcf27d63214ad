"""Experts in a file of their own tensors and 8-bit floats with their scales: what is missing or misshapen is named."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import refused, tiny_tokenizer
from safetensors.torch import load_file, save_file
from torture.changes import edit
from transformers import MixtralConfig, MixtralForCausalLM

from gradshield.base.errors import UserError
from gradshield.models.load import load_model
from gradshield.models.network import check_finite

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
W1 = "model.layers.1.block_sparse_moe.experts.2.w1.weight"


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory) -> Path:
    folder, tokenizer = tmp_path_factory.mktemp("mixtral"), tiny_tokenizer()
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=len(tokenizer), num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2, **SIZES
    )
    MixtralForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def changed(base: Path, folder: Path, change) -> Path:
    """A copy of the model with other tensors; `change` takes them and returns them."""
    shutil.copytree(base, folder)
    tensors = change(load_file(folder / "model.safetensors"))
    save_file({k: t.contiguous() for k, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_an_expert_of_whole_numbers_is_named_and_not_rounded(mixtral, tmp_path):
    refused(changed(mixtral, tmp_path / "m", lambda ts: ts | {W1: ts[W1].to(torch.int8)}), W1, "not floating point")


def test_an_expert_that_is_missing_or_of_another_shape_is_named(mixtral, tmp_path):
    lacking = changed(mixtral, tmp_path / "lacking", lambda ts: {k: t for k, t in ts.items() if k != W1})
    refused(lacking, f"its files lack {W1}")
    other = changed(mixtral, tmp_path / "other", lambda ts: ts | {W1: ts[W1][:-1]})
    refused(other, f"{W1} is [63, 32] in its files and [64, 32] for the other experts")


def test_experts_with_a_gap_in_their_numbers_are_not_stacked(mixtral, tmp_path):
    for number in ("7", "02"):
        to = W1.replace(".2.w1.weight", f".{number}.")
        renamed = changed(
            mixtral, tmp_path / number, lambda ts, to=to: {k.replace(W1[:-9], to): t for k, t in ts.items()}
        )
        refused(renamed, f"its files lack {W1}")
    extra = {W1.replace(".2.", ".9."): torch.zeros(64, 32)}
    refused(changed(mixtral, tmp_path / "extra", lambda ts: ts | extra), "its files lack ", "experts.4.w1.weight")


def test_a_gate_and_its_up_projection_of_two_shapes_are_not_joined(mixtral, tmp_path):
    def change(tensors):
        first, third = ({k: t for k, t in tensors.items() if k.endswith(f"{w}.weight")} for w in ("w1", "w3"))
        shorter, longer = {k: t[:-1] for k, t in first.items()}, {k: torch.cat([t, t[:1]]) for k, t in third.items()}
        return tensors | shorter | longer

    refused(changed(mixtral, tmp_path / "m", change), "0.w1.weight is [63, 32] and ", "0.w3.weight is [65, 32]")


@pytest.mark.parametrize(
    ("more", "shape"),
    [
        ("model.layers.1.mlp.gate.weight", (4, 32)),
        ("layers.1.block_sparse_moe.gate.weight", (4, 32)),
        ("model.layers.1.mlp.experts.gate_up_proj", (4, 128, 32)),
        ("layers.1.block_sparse_moe.experts.2.w1.weight", (64, 32)),
        ("model.layers.1.mlp.experts.2.w1.weight", (64, 32)),
    ],
)
def test_an_expert_or_a_router_that_is_there_twice_is_an_error_that_names_both(mixtral, tmp_path, more, shape):
    folder = changed(mixtral, tmp_path / "m", lambda ts: ts | {more: torch.randn(shape)})
    refused(folder, more, "model.layers.1.block_sparse_moe.", "which are one weight of a MixtralForCausalLM")


def eighths(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The projections as 8-bit floats, with a scale for each 16 × 16 block."""
    found = {}
    for name, tensor in tensors.items():
        found[name] = tensor
        if "proj" in name or ".experts." in name:
            rows, columns = tensor.shape
            blocks = tensor.reshape(rows // 16, 16, columns // 16, 16)
            scale = blocks.abs().amax((1, 3)) / 448
            found[name] = (blocks / scale[:, None, :, None]).reshape(rows, columns).to(torch.float8_e4m3fn)
            found[f"{name}_scale_inv"] = scale
    return found


UP = "model.layers.1.mlp.up_proj.weight_scale_inv"


@pytest.mark.parametrize(("kind", "scale"), [("tiny_folder", UP), ("mixtral", f"{W1}_scale_inv")])
def test_8_bit_floats_without_their_scales_are_refused(request, tmp_path, kind, scale):
    base = Path(request.getfixturevalue(kind))
    cases = {
        "whole": lambda ts: ts,
        "missing": lambda ts: {k: t for k, t in ts.items() if k != scale},
        "all missing": lambda ts: {k: t for k, t in ts.items() if "scale" not in k},
        "misshapen": lambda ts: ts | {scale: ts[scale][:1]},
        "a norm rounded": lambda ts: ts | {"model.norm.weight": ts["model.norm.weight"].to(torch.int8)},
    }
    said = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
    for label, change in cases.items():
        folder = changed(base, tmp_path / label, lambda ts, change=change: change(eighths(ts)))
        edit(folder / "config.json", lambda config: config | {"quantization_config": said})
        if label == "whole":
            load_model(str(folder), device="cpu")
        elif label == "misshapen":
            refused(folder, f"{scale} is [1, 2] in its files and [4, 2] by weight_block_size in its config")
        elif label == "a norm rounded":
            refused(folder, "model.norm.weight", "not floating point")
        else:
            refused(folder, "its files lack model.layers.", "_scale_inv")


def test_whole_numbers_under_a_config_of_8_bit_floats_are_not_rounded(mixtral, tmp_path):
    said = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
    for name in (W1, "model.layers.1.block_sparse_moe.gate.weight"):
        folder = changed(mixtral, tmp_path / name, lambda ts, name=name: ts | {name: (ts[name] * 50).to(torch.int8)})
        edit(folder / "config.json", lambda config: config | {"quantization_config": said})
        refused(folder, name, "is I8, not floating point")


def test_experts_of_4_bit_floats_in_bytes_load(mixtral, tmp_path):
    def change(tensors):
        found = dict(tensors)
        for name in (n for n in tensors if ".experts." in n):
            rows, columns = tensors[name].shape
            found[name] = torch.randint(-128, 128, (rows, columns // 2), dtype=torch.int8)
            found[f"{name}_scale_inv"] = torch.full((rows, columns // 32), 125, dtype=torch.uint8)
        return found

    folder = changed(mixtral, tmp_path / "m", change)
    edit(folder / "config.json", lambda config: config | {"quantization_config": {"quant_method": "fp8"}})
    weight = load_model(str(folder), device="cpu").net.model.layers[1].mlp.experts.down_proj
    assert weight.shape == (4, 32, 64) and weight.abs().max() == 6 / 4


def test_8_bit_floats_are_tried_for_nan(tmp_path):
    weight = torch.nn.Parameter(torch.ones(4, 4).to(torch.float8_e4m3fn), requires_grad=False)
    check_finite("it", torch.nn.ParameterDict({"weight": weight}))
    weight.view(torch.uint8)[2, 1] = 0x7F
    with pytest.raises(UserError, match="it: weight holds NaN or infinity"):
        check_finite("it", torch.nn.ParameterDict({"weight": weight}))
