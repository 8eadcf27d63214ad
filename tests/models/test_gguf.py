"""A GGUF file is read whole and alone: its tensors and values count, and what lies beside it does not."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import CHATML, refused, tiny_net, tiny_tokenizer
from gguf import GGUFWriter
from torture.ggufs import write_gguf
from transformers import AutoConfig, AutoModelForCausalLM

from gradshield.base.errors import UserError
from gradshield.models.gguf import refuse_ignored, shared_reader
from gradshield.models.load import load_model
from gradshield.models.network import _dropped


def test_a_gguf_loads_whatever_its_name(tmp_path):
    write_gguf(tmp_path / "model.gguf", {})
    shutil.copy(tmp_path / "model.gguf", tmp_path / "model.safetensors")
    one, other = (load_model(str(tmp_path / f"model.{end}"), device="cpu") for end in ("gguf", "safetensors"))
    assert torch.equal(one.net.lm_head.weight, other.net.lm_head.weight)


@pytest.mark.parametrize("part", ["token_embd", "output_norm", "blk.1.", "attn_q"])
def test_a_gguf_without_a_tensor_names_it(tmp_path, part):
    write_gguf(tmp_path / "model.gguf", {}, leave=part)
    refused(tmp_path / "model.gguf", "its files lack ")


NOT_OF_LLAMA = ["blk.7.attn_q.weight", "blk.0.ffn_up_exps.weight", "rotary_emb.inv_freq", "rope_factors_long.weight"]


@pytest.mark.parametrize("name", NOT_OF_LLAMA)
def test_a_gguf_with_a_tensor_too_many_names_it(tmp_path, name):
    write_gguf(tmp_path / "model.gguf", {}, more=(name,))
    refused(tmp_path / "model.gguf", f"its files hold {name}")


def test_the_shared_reader_of_a_gguf_reads_what_its_own_does(tmp_path):
    import gguf
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    values = {"some.factor": 0.1, "some.text": "é, 你好", "some.flag": True, "some.count": 2**31 - 1}
    write_gguf(tmp_path / "model.gguf", values)
    own, values = gguf.GGUFReader(tmp_path / "model.gguf"), load_gguf_checkpoint(tmp_path / "model.gguf")
    with shared_reader():
        shared = gguf.GGUFReader(tmp_path / "model.gguf")
        assert load_gguf_checkpoint(tmp_path / "model.gguf") == values and values["tokenizer"]["tokens"]
    assert type(shared) is not type(own) and list(shared.fields) == list(own.fields)
    for one, other in zip(shared.fields.values(), own.fields.values()):
        assert (one.offset, one.data, one.types) == (other.offset, other.data, other.types)
        assert [(p.dtype, p.tolist()) for p in one.parts] == [(p.dtype, p.tolist()) for p in other.parts]
    for one, other in zip(shared.tensors, own.tensors, strict=True):
        assert (one.name, one.tensor_type, one.data.tolist()) == (other.name, other.tensor_type, other.data.tolist())


def test_scaled_positions_of_a_gguf_are_refused_as_transformers_leaves_them_out(tmp_path):
    file = tmp_path / "model.gguf"
    factor, attention = "scaling.factor", "scaling.attn_factor"
    for kind, key in (("yarn", factor), ("linear", factor), ("linear", "scale_linear"), ("yarn", attention)):
        write_gguf(file, {"llama.rope.scaling.type": kind, f"llama.rope.{key}": 4.0})
        refused(file, f"llama.rope.{key} = 4.0 is ignored")
    for kind, factor in (("none", 4.0), ("linear", 1.0)):
        write_gguf(file, {"llama.rope.scaling.type": kind, "llama.rope.scaling.factor": factor})
        load_model(str(file), device="cpu")


def test_one_part_of_a_split_gguf_is_refused(tmp_path):
    write_gguf(tmp_path / "model.gguf", {"split.no": 0, "split.count": 3})
    refused(tmp_path / "model.gguf", "part 1 of 3", "llama-gguf-split --merge")


@pytest.mark.parametrize("share", [0.001, 0.01, 0.3, 0.9, 0.999])
def test_a_truncated_gguf_is_one_line(tmp_path, share):
    file = tmp_path / "model.gguf"
    write_gguf(file, {})
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    refused(file, "GGUF")


def test_an_end_token_that_a_gguf_does_not_have_is_one_line(tmp_path):
    write_gguf(tmp_path / "model.gguf", {"tokenizer.ggml.eos_token_id": 10**6})
    refused(tmp_path / "model.gguf", "its end token has number 1000000")


def test_rope_factors_of_a_gguf_divide_the_frequencies(tmp_path):
    write_gguf(tmp_path / "plain.gguf", {})
    write_gguf(tmp_path / "scaled.gguf", {}, more=("rope_freqs.weight",))
    import gguf

    (tensor,) = (t for t in gguf.GGUFReader(tmp_path / "scaled.gguf").tensors if t.name == "rope_freqs.weight")
    plain, scaled = (load_model(str(tmp_path / f"{name}.gguf"), device="cpu").net.model for name in ("plain", "scaled"))
    factors = torch.tensor(tensor.data.tolist())
    assert torch.allclose(scaled.rotary_emb.inv_freq * factors, plain.rotary_emb.inv_freq)


def test_a_buffers_name_in_a_gguf_of_transformers_newer_reader_is_left_over():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8, "vocab_size": 64}
    with torch.device("meta"):
        net = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_5_text", **sizes))
    names = ("blk.0.attn_norm.weight", "model.rotary_emb.inv_freq", "rotary_emb.original_inv_freq")
    assert _dropped(net, dict.fromkeys(names, (4,))) == set(names[1:])


@pytest.mark.parametrize("with_config", [False, True])
def test_what_lies_beside_a_gguf_changes_nothing(tmp_path, tiny_folder, with_config):
    from peft import LoraConfig, get_peft_model

    (tmp_path / "alone").mkdir()
    write_gguf(tmp_path / "alone" / "model.gguf", {})
    alone = load_model(str(tmp_path / "alone" / "model.gguf"), device="cpu")
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "folder"))
    shutil.copy(tmp_path / "alone" / "model.gguf", folder)
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    net = get_peft_model(tiny_net(tiny_tokenizer()), lora)
    net.peft_config["default"].base_model_name_or_path = tiny_folder
    net.save_pretrained(folder)
    words = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(words | {"normalizer": {"type": "Lowercase"}}))
    (folder / "chat_template.jinja").write_text("Other" + CHATML)
    (folder / "generation_config.json").write_text('{"eos_token_id": 5}')
    if not with_config:
        (folder / "config.json").unlink()
    beside = load_model(str(folder / "model.gguf"), device="cpu")
    assert beside.fingerprint == alone.fingerprint and beside.name == str(folder / "model.gguf")
    assert beside.tokenizer("HELLO")["input_ids"] == alone.tokenizer("HELLO")["input_ids"]
    assert beside.net.generation_config.eos_token_id == alone.net.generation_config.eos_token_id
    ids = torch.arange(4, 16)[None]
    assert torch.equal(beside.net(input_ids=ids).logits, alone.net(input_ids=ids).logits)


TINY = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 2}
EPSILON, RMS = "attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon"
SCALES = ("attention.scale", "logit_scale", "residual_scale", "embedding_scale", "expert_weights_scale")


@pytest.mark.parametrize(
    ("kind", "own", "other"),
    [
        ("llama", {"rope.dimension_count": 8, RMS: 1e-6}, {"rope.freq_base": 5e5, RMS: 1e-5}),
        ("starcoder2", {"rope.freq_base": 1e4, EPSILON: 1e-5}, {"rope.freq_base": 1e6}),
        ("stablelm", {"rope.dimension_count": 2}, {"rope.freq_base": 1e6, "rope.dimension_count": 8}),
        ("nemotron", {"rope.dimension_count": 4}, {"rope.dimension_count": 8, EPSILON: 0.5}),
        ("falcon", {EPSILON: 1e-5, "rope.freq_base": 1e4}, {EPSILON: 1e-6}),
        ("gpt2", {EPSILON: 1e-5, "rope.freq_base": 1e4}, {EPSILON: 1e-6}),
        (
            "gemma2",
            {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "attention.key_length": 256},
            {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 15.0, "attention.key_length": 128},
        ),
        ("llama", {"attention.scale": 8**-0.5, "expert_weights_scale": 1.0}, dict.fromkeys(SCALES, 0.3)),
        ("llama", {"attention.causal": True}, {"attention.causal": False, "attention.max_alibi_bias": 8.0}),
        ("llama", {"attention.clamp_kqv": 0.0, "logit_scale": 0.0}, {"attention.clamp_kqv": 0.1}),
        ("bloom", {"attention.max_alibi_bias": 8.0}, {"attention.max_alibi_bias": 4.0}),
        ("mamba", {"ssm.dt_b_c_rms": False}, {"ssm.dt_b_c_rms": True}),
        ("gemma3_text", {"rope.freq_base": 1e6, RMS: 1e-6}, {"rope.freq_base": 5e5, "final_logit_softcapping": 30.0}),
    ],
)
def test_a_value_of_a_gguf_that_transformers_ignores_is_refused(tmp_path, kind, own, other):
    with torch.device("meta"):
        net = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **TINY))

    def check(values: dict[str, float]) -> None:
        architecture = kind.removesuffix("_text")
        writer = GGUFWriter(tmp_path / "model.gguf", architecture)
        for key, value in values.items():
            add = {float: writer.add_float32, bool: writer.add_bool}.get(type(value), writer.add_uint32)
            add(f"{architecture}.{key}", value)
        writer.add_tensor("output.weight", torch.ones(2, 2).numpy())
        for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
            write()
        writer.close()
        refuse_ignored(net, tmp_path / "model.gguf")

    check(own)
    for key, value in other.items():
        with pytest.raises(UserError, match=rf"{key} = .* is ignored by transformers"):
            check(own | {key: value})


def test_a_gemma_whose_size_scales_attention_otherwise_is_refused(tmp_path):
    write_gguf(tmp_path / "model.gguf", {"general.architecture": "gemma2"})
    for layers, scalar, right in ((46, 256, False), (46, 8, True), (26, 256, True)):
        config = AutoConfig.for_model("gemma2", **TINY | {"num_hidden_layers": layers}, query_pre_attn_scalar=scalar)
        with torch.device("meta"):
            net = AutoModelForCausalLM.from_config(config)
        if right:
            refuse_ignored(net, tmp_path / "model.gguf")
            continue
        with pytest.raises(UserError, match="the scale of attention in gemma2 of 46 layers is ignored"):
            refuse_ignored(net, tmp_path / "model.gguf")


def test_a_gguf_is_compared_with_the_network_that_is_made_of_it(tmp_path):
    write_gguf(tmp_path / "model.gguf", {"llama.final_logit_softcapping": 30.0})
    refused(tmp_path / "model.gguf", "llama.final_logit_softcapping = 30.0 is ignored by transformers")
