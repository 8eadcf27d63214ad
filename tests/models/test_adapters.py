"""An adapter over a model is that model as PEFT computes it, or an error in one line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import CHATML, refused, tiny_net, tiny_tokenizer
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, VBLoRAConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from safetensors.torch import load_file, save_file
from torture.changes import PICKLE, edit

from gradshield.base.errors import UserError
from gradshield.models.load import load_model

KEPT = {"config.json", "generation_config.json", "model.safetensors"}  # what a merged model has of its own


def saved(folder: Path, base: str, **options) -> Path:
    """A LoRA of random numbers for the tiny model."""
    torch.manual_seed(1)
    config = LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False, **options)
    net = get_peft_model(tiny_net(tiny_tokenizer()), config)
    for name, weight in net.named_parameters():
        if "modules_to_save" in name or "trainable_tokens" in name:
            weight.data.add_(0.3 * torch.randn_like(weight))
    net.peft_config["default"].base_model_name_or_path = base
    net.save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(tiny_folder, tmp_path) -> Path:
    return saved(tmp_path / "adapter", tiny_folder, target_modules=["q_proj", "v_proj"])


@torch.no_grad()
def logits(net) -> torch.Tensor:
    return net(input_ids=torch.arange(12)[None]).logits


def unmerged(folder: Path) -> torch.Tensor:
    """The logits of the tiny model with the adapter, as PEFT computes them."""
    return logits(PeftModel.from_pretrained(tiny_net(tiny_tokenizer()), str(folder)).eval())


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 5]}},
        {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [3, 5]}},
        {"target_modules": ["q_proj"], "layer_replication": [[0, 3], [1, 3]]},
        {"target_modules": ["q_proj"], "target_parameters": ["embed_tokens.weight"]},
    ],
    ids=str,
)
def test_an_adapter_of_shared_weights_is_the_same_model_merged_as_peft_has_it_unmerged(tiny_folder, tmp_path, options):
    folder = saved(tmp_path / "adapter", tiny_folder, **options)
    expected = unmerged(folder)
    found = load_model(str(folder), device="cpu")
    assert torch.allclose(logits(found.net), expected, atol=1e-4)
    assert not torch.allclose(expected, logits(tiny_net(tiny_tokenizer())), atol=0.1)
    found.net.save_pretrained(tmp_path / "merged")
    shutil.copytree(tiny_folder, tmp_path / "merged", dirs_exist_ok=True, ignore=lambda _, names: set(names) & KEPT)
    assert torch.allclose(logits(load_model(str(tmp_path / "merged"), device="cpu").net), expected, atol=1e-4)


@pytest.mark.parametrize("ends", [["model.embed_tokens"], ["lm_head"], ["model.embed_tokens", "lm_head"]], ids=str)
def test_a_base_weight_in_an_adapter_is_that_of_both_tied_ends(adapter, ends):
    file, weight = adapter / "adapter_model.safetensors", torch.randn(261, 32)
    own = {f"base_model.model.{end}.weight": weight.clone() for end in ends}
    save_file(load_file(file) | own, file, {"format": "pt"})
    net = load_model(str(adapter), device="cpu").net
    assert torch.equal(net.lm_head.weight, weight) and torch.equal(net.model.embed_tokens.weight, weight)
    assert torch.allclose(logits(net), unmerged(adapter), atol=1e-4)


@pytest.mark.parametrize("part", ["", ".base_layer"])
def test_two_base_weights_for_tied_ends_are_refused_if_they_differ(tiny_folder, tmp_path, part):
    targets = ["embed_tokens", "lm_head"] if part else ["q_proj"]
    file = saved(tmp_path / "a", tiny_folder, target_modules=targets) / "adapter_model.safetensors"
    ends = {f"base_model.model.{end}{part}.weight": torch.randn(261, 32) for end in ("model.embed_tokens", "lm_head")}
    save_file(load_file(file) | ends, file, {"format": "pt"})
    refused(file.parent, *ends, "differ, but the base model ties them")


def test_a_merge_that_changes_the_model_is_refused(adapter, monkeypatch):
    def doubled(layer, *args, merge=LoraLinear.merge, **kwargs):
        merge(layer, *args, **kwargs)
        layer.get_base_layer().weight.data += layer.get_delta_weight("default")

    monkeypatch.setattr(LoraLinear, "merge", doubled)
    refused(adapter, "merging it into the weights changes the model")


def test_more_layers_than_tensors_are_refused_before_they_are_made(adapter):
    edit(adapter / "adapter_config.json", lambda config: config | {"layer_replication": [[0, 3]] * 10})
    refused(adapter, "its config describes 30 layers, its file holds 12 tensors")
    edit(adapter / "adapter_config.json", lambda config: config | {"layer_replication": 3})
    refused(adapter, "can't be loaded: TypeError")


def test_an_initialisation_that_draws_random_numbers_at_every_load_is_refused(adapter):
    edit(adapter / "adapter_config.json", lambda config: config | {"init_lora_weights": "pissa_niter_4"})
    refused(adapter, "pissa_niter_4 changes the base by random numbers", "save it as plain LoRA")
    edit(adapter / "adapter_config.json", lambda config: config | {"init_lora_weights": "pissa"})
    assert torch.allclose(logits(load_model(str(adapter), device="cpu").net), unmerged(adapter), atol=1e-4)


def test_an_adapter_that_ties_its_own_layers_is_refused_or_the_same(tiny_folder, tmp_path):
    folder = saved(tmp_path / "a", tiny_folder, target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True)
    refused(folder, "ties")


def test_every_tensor_of_an_adapter_is_accounted_for(adapter):
    file = adapter / "adapter_model.safetensors"
    whole = load_file(file)
    save_file({name: t for name, t in whole.items() if "layers.1" not in name}, file, {"format": "pt"})
    refused(adapter, "lacks base_model.model.model.layers.1.")
    more = {name.replace("layers.1", "layers.9"): t.clone() for name, t in whole.items() if "layers.1" in name}
    save_file(whole | more, file, {"format": "pt"})
    refused(adapter, "holds base_model.model.model.layers.9.")


def test_empty_tensors_of_an_adapter_name_zero3(adapter):
    file = adapter / "adapter_model.safetensors"
    save_file({name: torch.zeros(0) for name in load_file(file)}, file, {"format": "pt"})
    refused(adapter, "is empty", "ZeRO-3")


def test_weights_that_are_not_finite_in_an_adapter_are_named(adapter):
    file = adapter / "adapter_model.safetensors"
    save_file({n: t * float("nan") if "layers.2" in n else t for n, t in load_file(file).items()}, file)
    refused(adapter, "layers.2", "holds NaN or infinity")


def test_a_resized_vocabulary_is_one_line(adapter):
    file = adapter / "adapter_model.safetensors"
    more = {"base_model.model.model.embed_tokens.weight": torch.zeros(300, 32)}
    save_file(load_file(file) | more, file, {"format": "pt"})
    refused(adapter, "its vocabulary was resized", "300 rows, the base model 261")


@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig])
def test_what_is_not_in_the_weights_is_one_line(tiny_folder, tmp_path, config):
    net = get_peft_model(tiny_net(tiny_tokenizer()), config(task_type="CAUSAL_LM", num_virtual_tokens=4))
    net.peft_config["default"].base_model_name_or_path = tiny_folder
    net.save_pretrained(tmp_path / "adapter")
    refused(tmp_path / "adapter", "_TUNING can't be merged into weights")


def test_a_bank_of_vectors_that_all_layers_share_is_refused_with_that_reason(tiny_folder, tmp_path):
    bank = VBLoRAConfig(r=4, num_vectors=16, vector_length=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    net = get_peft_model(tiny_net(tiny_tokenizer()), bank)
    net.peft_config["default"].base_model_name_or_path = tiny_folder
    net.save_pretrained(tmp_path / "adapter")
    refused(tmp_path / "adapter", "VB-LoRA saves one bank for all layers")


def test_an_adapter_that_is_its_own_base_is_one_line(adapter, tmp_path):
    edit(adapter / "adapter_config.json", lambda config: config | {"base_model_name_or_path": str(adapter)})
    refused(adapter, "it names itself as its base model")
    other = Path(shutil.copytree(adapter, tmp_path / "other"))  # a circle of two
    edit(adapter / "adapter_config.json", lambda config: config | {"base_model_name_or_path": str(other)})
    refused(adapter, "it names itself as its base model")


@pytest.mark.parametrize("base", ["\0", "base\n", "\x1b[31m"])
def test_a_base_of_no_printable_name_is_none(adapter, base):
    edit(adapter / "adapter_config.json", lambda config: config | {"base_model_name_or_path": base})
    refused(adapter, "names no base model")


def test_a_base_of_a_name_too_long_for_a_path_is_one_line(adapter):
    edit(adapter / "adapter_config.json", lambda config: config | {"base_model_name_or_path": "x" * 100_000})
    with pytest.raises(UserError, match="can't be loaded"):
        load_model(str(adapter), device="cpu")


ENDLESS = "([a-z_.0-9]+)+!"
WITHOUT_PREFIX = rf"^(?!base_model){ENDLESS}"  # PEFT tries it on the names that the base model has
AFTER_A_FIT = rf"(?:{ENDLESS}|q_proj|lora_A)"  # ends where what stands before the last dot is left out


@pytest.mark.parametrize(
    "value",
    [
        *({key: each} for key in ("target_modules", "exclude_modules") for each in (ENDLESS, WITHOUT_PREFIX)),
        {"target_modules": AFTER_A_FIT},
        {"target_modules": f"(?i){ENDLESS}"},
        {"rank_pattern": {ENDLESS: 4}},
        {"rank_pattern": {WITHOUT_PREFIX: 4}},
        {"modules_to_save": [ENDLESS]},
        {"layers_to_transform": [0], "layers_pattern": [ENDLESS]},
        {"layers_to_transform": [0], "layers_pattern": ENDLESS},
        {"peft_type": "IA3", "feedforward_modules": ENDLESS},
        {"peft_type": "FOURIERFT", "n_frequency_pattern": {ENDLESS: 4}},
    ],
    ids=str,
)
def test_a_regular_expression_that_does_not_end_is_stopped_and_named(adapter, monkeypatch, value):
    monkeypatch.setattr("gradshield.models.adapters.LIMIT", 0.2)
    edit(adapter / "adapter_config.json", lambda config: config | value)
    refused(adapter, ENDLESS, "does not end within 0.2 s")


def test_a_config_can_make_peft_import_nothing(adapter):
    edit(
        adapter / "adapter_config.json", lambda config: config | {"megatron_config": {"a": 1}, "megatron_core": "this"}
    )
    refused(adapter, "megatron_config names a module to import")


def test_a_pickled_adapter_is_refused(adapter, monkeypatch):
    monkeypatch.setattr(torch, "load", None)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    refused(adapter, "pickled adapters are not read")
    (adapter / "adapter_model.safetensors").write_bytes(PICKLE)
    refused(adapter, "a pickle; pickles are never read")


def test_an_adapters_own_template_and_tokenizer_count(adapter, tiny_folder):
    plain = load_model(str(adapter), device="cpu")
    (adapter / "chat_template.jinja").write_text("Q: {{ messages[0].content }} " + CHATML)
    other = load_model(str(adapter), device="cpu")
    assert other.tokenizer.chat_template.startswith("Q: ") and other.fingerprint != plain.fingerprint
    over = load_model(tiny_folder, adapter=str(adapter), device="cpu")
    assert over.tokenizer.chat_template == other.tokenizer.chat_template and over.fingerprint == other.fingerprint
    tokenizer = tiny_tokenizer("{{ messages[0].content }} {{ messages[-1].content }}")
    tokenizer.eos_token = "<|im_start|>"
    (adapter / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(adapter)
    assert load_model(str(adapter), device="cpu").tokenizer.eos_token == "<|im_start|>"


@pytest.mark.parametrize(
    "template", [" ", "{% for m in messages", "always the same", "{{ messages[0].content }}", "\udcff"]
)
def test_the_template_or_tokenizer_at_fault_is_named_not_the_base_model(adapter, tiny_folder, tmp_path, template):
    for file in (tmp_path / "own.jinja", adapter / "chat_template.jinja"):  # the one that is passed comes first
        file.write_text(template, errors="surrogateescape")
        with pytest.raises(UserError, match="chat template") as caught:
            given = {"chat_template": str(file)} if file.parent == tmp_path else {}
            load_model(str(adapter), device="cpu", **given)
        assert str(file) in str(caught.value) and tiny_folder not in str(caught.value)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<one>"])
    tokenizer.save_pretrained(adapter)
    refused(adapter, f"the tokenizer of {adapter} has 262 tokens, the model's embedding 261 rows")


def test_a_rank_beyond_its_tensors_is_refused_before_memory_is_taken(adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"r": 10**9}))
    refused(adapter, "its r of 1000000000 fits no tensor of adapter_model.safetensors")


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("LORA", "rank_pattern", {"q_proj": 10**9}),
        ("ADALORA", "init_r", 3 * 10**6),
        ("LILY", "num_B", 10**8),
        ("UNILORA", "theta_d_length", 10**10),
        ("TINYLORA", "u", 10**9),
        ("POLY", "n_skills", 10**9),
        ("PEANUT", "depth", 10**7),
        ("OFT", "num_cayley_neumann_terms", 10**9),
    ],
)
def test_a_number_of_an_adapters_config_beyond_its_tensors_is_refused(adapter, kind, key, value):
    edit(adapter / "adapter_config.json", lambda config: config | {"peft_type": kind, key: value})
    refused(adapter, f"its {key} of ", "fits no tensor of adapter_model.safetensors")


def test_a_list_of_an_adapters_config_longer_than_the_vocabulary_is_refused(adapter):
    many = {"trainable_token_indices": list(range(261)) * 20}
    edit(adapter / "adapter_config.json", lambda config: config | many)
    refused(adapter, "its trainable_token_indices has 5,220 entries, the model a vocabulary of 261")


def test_numbers_of_a_config_that_are_no_sizes_are_free(adapter):
    expected = logits(load_model(str(adapter), device="cpu").net)
    free = {"layers_to_transform": [0, 1, 2, 10**9], "num_parameters": 10**10, "alora_invocation_tokens": None}
    edit(adapter / "adapter_config.json", lambda config: config | free)
    assert torch.equal(logits(load_model(str(adapter), device="cpu").net), expected)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Adamss", {}),
        ("AdaLora", {"total_step": 10**6, "tinit": 5000, "tfinal": 5000, "init_r": 8}),
        ("Vera", {"projection_prng_key": 2**30}),
        ("TinyLora", {}),
        ("UniLora", {"proj_seed": 10**6}),
        ("FourierFT", {"random_loc_seed": 10**6}),
        ("Peanut", {}),
        ("OFT", {"oft_block_size": 4}),
        ("LoHa", {}),
        ("LoKr", {}),
        ("HRA", {}),
        ("IA3", {"feedforward_modules": []}),
    ],
)
def test_other_kinds_of_adapters_with_usual_settings_are_what_peft_makes_of_them(tiny_folder, tmp_path, kind, options):
    import peft

    if not hasattr(peft, f"{kind}Config"):
        pytest.skip(f"this version of PEFT has no {kind}")
    torch.manual_seed(1)
    config = getattr(peft, f"{kind}Config")(task_type="CAUSAL_LM", target_modules=["q_proj"], **options)
    net = get_peft_model(tiny_net(tiny_tokenizer()), config)
    net.peft_config["default"].base_model_name_or_path = tiny_folder
    net.save_pretrained(tmp_path / "adapter")
    found = load_model(str(tmp_path / "adapter"), device="cpu")
    assert torch.allclose(logits(found.net), unmerged(tmp_path / "adapter"), atol=1e-4)


def test_an_adapter_of_whole_numbers_is_refused_and_not_rounded(adapter):
    file = adapter / "adapter_model.safetensors"
    save_file({name: tensor.to(torch.int8) for name, tensor in load_file(file).items()}, file)
    refused(adapter, "lora_A.weight is I8, not floating point")


def test_a_scaling_that_makes_the_weights_nan_is_the_adapters_fault(adapter):
    edit(adapter / "adapter_config.json", lambda config: config | {"lora_alpha": float("nan")})
    refused(adapter, f"adapter {adapter}: ", "q_proj.weight", "holds NaN or infinity")
