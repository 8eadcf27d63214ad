"""Nothing of a model is made up, left out, or read from anything but safetensors and GGUF."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import refused
from safetensors.torch import load_file, save_file
from torture.changes import PICKLE, edit
from transformers import AutoConfig, AutoModelForCausalLM

from gradshield.base.errors import UserError
from gradshield.models.load import load_model
from gradshield.models.network import check_finite

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def folder(tiny_folder, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def rewrite(folder: Path, change) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors = change(tensors) or tensors
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})


@pytest.mark.parametrize("part", ["layers.1.", "layers.2.mlp.up_proj", "embed_tokens", "model.norm"])
def test_a_missing_tensor_is_an_error_that_names_it(folder, part):
    rewrite(folder, lambda tensors: {name: t for name, t in tensors.items() if part not in name})
    refused(folder, "its files lack ", part)


def test_a_missing_head_is_an_error_unless_it_is_tied(folder):
    load_model(str(folder), device="cpu")
    edit(folder / "config.json", lambda config: config | {"tie_word_embeddings": False})
    refused(folder, "its files lack lm_head.weight")


def test_more_layers_in_the_config_than_in_the_file_is_an_error(folder):
    edit(folder / "config.json", lambda config: config | {"num_hidden_layers": 4})
    refused(folder, "its files lack model.layers.3.")


def test_fewer_layers_in_the_config_than_in_the_file_is_an_error(folder):
    edit(folder / "config.json", lambda config: config | {"num_hidden_layers": 2})
    refused(folder, "its files hold model.layers.2.")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_a_prefix_that_fits_nothing_is_an_error(folder, prefix):
    rewrite(folder, lambda tensors: {prefix + name: t for name, t in tensors.items()})
    refused(folder, "its files lack ")


def test_a_tensor_of_another_shape_is_an_error_that_names_both(folder):
    rewrite(folder, lambda tensors: tensors | {"model.norm.weight": torch.ones(31)})
    refused(folder, "model.norm.weight is [31] in its files and [32] by its config")


@pytest.mark.parametrize("name", ["norm.weight", "layers.1.mlp.up_proj.weight", "embed_tokens.weight"])
def test_one_weight_under_two_names_is_an_error_that_names_both(folder, name):
    rewrite(folder, lambda tensors: tensors | {name: torch.randn_like(tensors[f"model.{name}"])})
    refused(folder, f" {name}", f" model.{name}", "which are one weight of a LlamaForCausalLM")
    rewrite(folder, lambda tensors: {key.removeprefix("model."): t for key, t in tensors.items() if key != name})
    load_model(str(folder), device="cpu")
    rewrite(folder, lambda tensors: tensors | {"lm_head.weight": tensors["embed_tokens.weight"].clone()})
    load_model(str(folder), device="cpu")


LAYER = "model.layers.0.self_attn.rotary_emb.inv_freq"
FREQUENCIES = 10000 ** -(torch.arange(4) / 4)


@pytest.mark.parametrize("key", [LAYER, "model.rotary_emb.inv_freq", "rotary_emb.inv_freq", "inv_freq"])
def test_a_buffer_in_a_file_is_refused_unless_it_is_the_one_that_is_computed(folder, key):
    plain = load_file(folder / "model.safetensors")
    for right in (FREQUENCIES, FREQUENCIES.half(), FREQUENCIES.bfloat16()):
        rewrite(folder, lambda _, right=right: plain | {key: right})
        load_model(str(folder), device="cpu")
    for other in (torch.randn(4), torch.randn(99), FREQUENCIES[:3], FREQUENCIES / 8, FREQUENCIES * float("nan")):
        rewrite(folder, lambda _, other=other: plain | {key: other})
        refused(folder, f"its files hold {key}", "which a LlamaForCausalLM with its config doesn't use")
    rewrite(folder, lambda _: plain | {LAYER + ".weight": FREQUENCIES})  # which transformers drops for a part of it
    refused(folder, f"its files hold {LAYER}.weight")


def test_frequencies_that_were_stored_before_scaling_load(folder):
    rewrite(folder, lambda tensors: tensors | {LAYER: FREQUENCIES})
    rope = {"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0}
    edit(folder / "config.json", lambda config: config | {"rope_parameters": rope})
    assert torch.allclose(load_model(str(folder), device="cpu").net.model.rotary_emb.inv_freq, FREQUENCIES / 8)


def test_a_config_beyond_its_files_is_refused_before_memory_is_taken(folder):
    edit(folder / "config.json", lambda config: config | {"vocab_size": 10**12})
    refused(folder, "its config describes 3.2e+13 weights", "embed_tokens")
    edit(folder / "config.json", lambda config: config | {"vocab_size": 261, "num_hidden_layers": 10**5})
    refused(folder, "its config describes 100000 layers")


@pytest.mark.parametrize("count", [{"num_layers": 10**9}, {"num_labels": 10**9}, {"text": {"num_labels": 10**9}}])
def test_a_count_that_fills_the_memory_when_the_config_is_read_is_refused(folder, count):
    edit(folder / "config.json", lambda config: config | count | {"model_type": "qwen2"})
    refused(folder, "in its config.json is 1000000000")


def test_a_million_names_of_labels_are_refused(folder):
    edit(folder / "config.json", lambda config: config | {"id2label": dict.fromkeys(range(1_000_001), "x")})
    refused(folder, "id2label in its config.json holds 1000001; no model has so many")


def test_a_config_that_no_answer_can_be_generated_with_is_one_line(folder):
    edit(folder / "config.json", lambda config: config | {"sliding_window": "x"})
    refused(folder, "can't compute: TypeError")


def test_a_device_that_computes_nothing_is_one_line(folder):
    with pytest.raises(UserError, match="--device meta: not available"):
        load_model(str(folder), device="meta")


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "chat_template.jinja", "model.safetensors"])
def test_a_pipe_in_a_model_s_folder_is_refused_before_it_is_opened(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    refused(folder, name, "neither a file nor a folder")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja", "x.index.json"])
def test_a_text_of_gigabytes_in_a_model_s_folder_is_refused_before_it_is_read(folder, name):
    with (folder / name).open("wb") as stream:
        stream.truncate(10 << 30)
    refused(folder, name, "over the limit of 64 MB")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(folder, value):
    rewrite(folder, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].view(-1)[7:8].fill_(value) and None)
    refused(folder, "model.layers.1.mlp.up_proj.weight holds NaN or infinity")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_infinities_of_both_signs_are_found_and_a_sum_that_overflows_is_none(dtype):
    large = torch.full((4, 1000), 0.6 * torch.finfo(dtype).max, dtype=dtype)
    net = torch.nn.ParameterDict({"large": large, "small": torch.ones(3, dtype=dtype)})
    assert not large.sum().isfinite()
    check_finite("it", net)
    for values in ([float("nan")], [float("inf")], [float("inf"), float("-inf")]):
        with torch.no_grad():
            net["small"][: len(values)] = torch.tensor(values, dtype=dtype)
        with pytest.raises(UserError, match="it: small holds NaN or infinity"):
            check_finite("it", net)


def test_a_buffer_that_is_not_finite_is_named():
    net = torch.nn.Module()
    net.register_buffer("bias", torch.ones(3))
    check_finite("it", net)
    net.register_buffer("bias", torch.tensor([1, float("inf"), 1]))
    with pytest.raises(UserError, match="it: bias holds NaN or infinity"):
        check_finite("it", net)


def test_a_model_that_looks_ahead_is_not_causal(folder, tmp_path):
    edit(folder / "config.json", lambda config: config | {"is_causal": False})
    refused(folder, "not a causal language model (a later token changes what is predicted before it)")
    sizes = {"vocab_size": 261, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    for decoder in (True, False):
        shutil.copytree(folder, tmp_path / "bert", dirs_exist_ok=True)
        config = AutoConfig.for_model("bert", num_attention_heads=4, is_decoder=decoder, **sizes)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "bert")
        if decoder:
            load_model(str(tmp_path / "bert"), device="cpu")
    refused(tmp_path / "bert", "not a causal language model")


def test_logits_that_are_nan_are_said_and_not_called_unaligned(folder):
    rewrite(folder, lambda ts: {n: t * (1e22 if ("q_proj" in n or "k_proj" in n) else 1) for n, t in ts.items()})
    refused(folder, "its logits are NaN")


def sharded(folder: Path) -> dict:
    """The weights in two shards; their index, not yet written."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: SHARDS[n % 2] for n, name in enumerate(sorted(tensors))}
    for shard in SHARDS:
        save_file({n: t for n, t in tensors.items() if places[n] == shard}, folder / shard, {"format": "pt"})
    return {"metadata": {"total_size": 0}, "weight_map": places}


def index(folder: Path, content: dict) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def test_two_shards_are_the_same_model_as_one_file(folder, tiny_folder):
    index(folder, sharded(folder))
    one, two = load_model(tiny_folder, device="cpu"), load_model(str(folder), device="cpu")
    for name, weight in one.net.state_dict().items():
        assert torch.equal(weight, two.net.state_dict()[name])


@pytest.mark.parametrize("name", ["pytorch_model.bin", "../model.safetensors", "/tmp/x.safetensors", 3, None])
def test_an_index_names_only_safetensors_beside_it(folder, name):
    content = sharded(folder)
    content["weight_map"]["model.norm.weight"] = name
    index(folder, content)
    (folder / "pytorch_model.bin").write_bytes(PICKLE)
    refused(folder, "places model.norm.weight in", "only safetensors files beside it are read")


def test_an_index_without_metadata_is_told_what_it_lacks(folder):
    content = sharded(folder)
    del content["metadata"]
    index(folder, content)
    refused(folder, "has no metadata, which transformers needs", '"metadata": {}')


def test_a_pickle_is_refused_under_any_name(folder, monkeypatch):
    monkeypatch.setattr(torch, "load", None)
    content = sharded(folder)
    index(folder, content)
    (folder / SHARDS[1]).write_bytes(PICKLE)
    refused(folder, SHARDS[1], "a pickle; pickles are never read")
    (folder / SHARDS[1]).write_bytes(b"PK\x03\x04" + bytes(100))
    refused(folder, SHARDS[1], "pickles are never read")
    (folder / "model.safetensors.index.json").unlink()
    (folder / "pytorch_model.bin").write_bytes(PICKLE)
    for shard in SHARDS:
        (folder / shard).unlink()
    refused(folder, "only pickled weights")
    (folder / "model.gguf").write_bytes(PICKLE)
    refused(folder / "model.gguf", "not a GGUF file")


@pytest.mark.parametrize("name", ["a\0.safetensors", "folder.safetensors"])
def test_a_shard_that_can_not_be_read_is_not_called_empty(folder, name):
    content = sharded(folder)
    content["weight_map"]["model.norm.weight"] = name
    index(folder, content)
    (folder / "folder.safetensors").mkdir()
    refused(folder, name, "can't be read")


@pytest.mark.parametrize("kind", [torch.int8, torch.int64, torch.bool, torch.complex64])
def test_weights_of_whole_or_complex_numbers_are_named_and_not_rounded(folder, kind):
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(folder, lambda tensors: tensors | {name: tensors[name].to(kind)})
    refused(folder, name, "not floating point")


@pytest.mark.parametrize("kind", [torch.int8, torch.bool])
def test_weights_under_names_that_change_on_loading_are_not_rounded_either(folder, kind):
    rewrite(folder, lambda ts: ts | {"lm_head.weight": ts.pop("model.embed_tokens.weight").to(kind)})
    refused(folder, "lm_head.weight", "not floating point")


def test_a_causal_mask_that_older_versions_stored_is_no_weight(tmp_path, tiny_gpt2):
    tiny_gpt2.net.save_pretrained(tmp_path)
    tiny_gpt2.tokenizer.save_pretrained(tmp_path)
    plain = load_file(tmp_path / "model.safetensors")
    mask = torch.ones(1, 1, 256, 256, dtype=torch.uint8).tril()
    rewrite(tmp_path, lambda _: plain | {"transformer.h.0.attn.bias": mask})
    load_model(str(tmp_path), device="cpu")
    name = "transformer.h.0.attn.c_attn.bias"
    rewrite(tmp_path, lambda _: plain | {name: plain[name].to(torch.int8)})
    refused(tmp_path, name, "not floating point")


def test_weights_of_other_floats_load(folder):
    kinds = (torch.float16, torch.bfloat16, torch.float64)
    rewrite(folder, lambda tensors: {name: t.to(kinds[n % 3]) for n, (name, t) in enumerate(tensors.items())})
    assert load_model(str(folder), device="cpu").net.dtype == torch.float32


def test_a_config_may_not_name_the_file_of_its_weights(folder):
    (folder / "pytorch_model.bin").write_bytes(PICKLE)
    named = {"transformers_weights": "pytorch_model.bin"}
    for change in (named, {"text_config": named}, {"text_config": {"vision_config": named}}):
        shutil.copy(plain := f"{folder}/config.json", f"{folder}/plain.json")
        edit(folder / "config.json", lambda config, change=change: config | change)
        refused(folder, "transformers_weights")
        shutil.move(f"{folder}/plain.json", plain)


def test_a_config_may_not_name_another_config_which_nothing_checks(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.4.0.0.json").write_text(json.dumps(config | {"transformers_weights": "other.safetensors"}))
    (folder / "config.json").write_text(json.dumps(config | {"configuration_files": ["config.4.0.0.json"]}))
    refused(folder, "its config.json names another config (configuration_files); remove it")


def test_a_shard_that_lacks_what_the_index_places_there_is_named(folder):
    content = sharded(folder)
    content["weight_map"]["model.norm.weight"] = SHARDS[content["weight_map"]["model.norm.weight"] == SHARDS[0]]
    index(folder, content)
    refused(folder, "lacks model.norm.weight")
    (folder / SHARDS[0]).unlink()
    refused(folder, SHARDS[0], "no such file")


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "_experts_implementation"])
@pytest.mark.parametrize("value", ["someone/kernels", "paged|someone/kernels@main:forward", {"": "someone/kernels"}])
def test_a_config_may_not_name_kernels_to_be_downloaded(folder, key, value):
    edit(folder / "config.json", lambda config: config | {key: value})
    refused(folder, "names a repository of kernels")
    edit(folder / "config.json", lambda config: {k: v for k, v in config.items() if k != key} | {"text": {key: value}})
    refused(folder, "names a repository of kernels")


@pytest.mark.parametrize("kind", ["flex_attention", "paged|eager"])
@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_attention_that_is_compiled_or_paged_is_computed_plainly(folder, key, kind):
    plain = load_model(str(folder), device="cpu")
    edit(folder / "config.json", lambda config: config | {key: kind})
    model = load_model(str(folder), device="cpu")
    ids = torch.arange(12)[None]
    assert torch.equal(model.net(ids).logits, plain.net(ids).logits)
    model.net(inputs_embeds=model.net.get_input_embeddings()(ids).requires_grad_()).logits.sum().backward()


def test_an_empty_tensor_is_an_error_that_names_zero3(folder):
    rewrite(folder, lambda tensors: tensors | {"model.norm.weight": torch.zeros(0)})
    refused(folder, "model.norm.weight is empty", "ZeRO-3")


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_plain_weights_under_a_config_of_bitsandbytes_are_one_line(folder, bits):
    said = {"quant_method": "bitsandbytes", bits: True}
    edit(folder / "config.json", lambda config: config | {"quantization_config": said})
    refused(folder, "bitsandbytes quantised the weights, but they are not", "--quantize 4bit")


def test_a_config_that_rounds_the_weights_as_they_load_is_refused(folder):
    said = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
    edit(folder / "config.json", lambda config: config | {"quantization_config": said})
    refused(folder, "weights are to be rounded as they load", "remove quantization_config")


def test_a_generation_config_that_is_torn_is_an_error_and_not_left_out(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": 1')
    refused(folder, "generation_config.json: can't be read")


# Fingerprint ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file",
    ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"],
)
def test_any_byte_of_any_file_that_is_read_counts(folder, file):
    before = load_model(str(folder), device="cpu").fingerprint
    with (folder / file).open("a") as stream:
        stream.write("\n")
    assert load_model(str(folder), device="cpu").fingerprint != before


def test_a_hub_snapshot_counts_byte_by_byte(folder, tmp_path, monkeypatch):
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    snapshot = cache / "models--org--tiny" / "snapshots" / ("0" * 40)
    shutil.copytree(folder, snapshot)
    (cache / "models--org--tiny" / "refs").mkdir()
    (cache / "models--org--tiny" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    before = load_model("org/tiny", device="cpu")
    rewrite(snapshot, lambda tensors: tensors["model.norm.weight"].add_(1) is None or None)
    after = load_model("org/tiny", device="cpu")
    assert before.name == after.name == "org/tiny" and before.fingerprint != after.fingerprint
