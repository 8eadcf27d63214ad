"""Adapters over one another: what is loaded from the uppermost one's folder is what it was trained over."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import random_examples, refused
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3Config

from gradshield.base.errors import UserError
from gradshield.base.settings import FinetuneSettings, ModelSettings
from gradshield.models.load import Model, load_model, parked_on_cpu
from gradshield.models.on_disk import disk_fingerprint
from gradshield.training.finetune import finetune

FAST = FinetuneSettings(learning_rate=1e-2, epochs=1, batch=4)


@pytest.fixture
def lower(tiny_folder, tmp_path) -> str:
    """An adapter of the random model."""
    model = load_model(tiny_folder)
    finetune(model, random_examples(8, len(model.tokenizer)), tmp_path / "lower", FAST)
    return str(tmp_path / "lower")


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.net(input_ids=torch.tensor([[5, 6, 7, 8, 9]])).logits


@pytest.mark.parametrize("as_model", [False, True])
def test_an_adapter_over_an_adapter_names_it_and_loads_alone_as_the_two_do(
    tiny_folder, lower, tmp_path, monkeypatch, as_model
):
    monkeypatch.chdir(tmp_path)
    over = load_model("lower") if as_model else load_model(tiny_folder, adapter="lower")
    assert over.name == tiny_folder and over.adapters == (lower,) and over.base == lower
    finetune(over, random_examples(8, len(over.tokenizer), seed=3), tmp_path / "upper", FAST)
    monkeypatch.chdir("/")
    upper = str(tmp_path / "upper")
    assert json.loads((tmp_path / "upper" / "adapter_config.json").read_text())["base_model_name_or_path"] == lower
    alone, both = load_model(upper), load_model(tiny_folder, adapter=[lower, upper])
    assert torch.equal(logits(alone), logits(both)) and not torch.equal(logits(alone), logits(over))
    assert alone.fingerprint == both.fingerprint and alone.adapters == (lower, upper)


@pytest.mark.slow
def test_the_embedded_models_own_adapter_is_part_of_it():
    model = load_model()
    assert model.adapters == () and model.base == "embedded"


@pytest.mark.parametrize("quantize", ["4bit", "8bit"])
def test_a_second_adapter_over_quantised_weights_is_refused(tiny_folder, lower, quantize):
    pytest.importorskip("bitsandbytes")
    assert load_model(tiny_folder, adapter=lower, quantize=quantize).base == lower
    for name, adapters in ((tiny_folder, [lower, lower]), (lower, lower)):
        with pytest.raises(UserError, match=f"--quantize {quantize}: .*only one adapter"):
            load_model(name, adapter=adapters, quantize=quantize)


def test_any_edit_of_weights_configs_or_tokenizer_is_another_fingerprint(tiny_folder, lower, tmp_path):
    def edited(name: str, change) -> str:
        folder = tmp_path / name
        shutil.copytree(tiny_folder, folder)
        change(folder)
        return load_model(str(folder)).fingerprint

    def weights(folder):
        file = folder / "model.safetensors"
        tensors = load_file(file)
        tensors["model.layers.1.mlp.down_proj.weight"][3, 4] += 1
        save_file(tensors, file, {"format": "pt"})

    def template(folder):
        text = load_model(str(folder)).tokenizer.chat_template
        (folder / "chat_template.jinja").write_text(text + " ")

    def config(folder):
        text = (folder / "config.json").read_text()
        (folder / "config.json").write_text(text.replace('"rope_theta": 10000.0', '"rope_theta": 20000.0'))

    def tokenizer(folder):
        text = (folder / "tokenizer.json").read_text()
        (folder / "tokenizer.json").write_text(text.replace('"add_prefix_space": false', '"add_prefix_space": true'))

    def special(folder):  # as the usual mend of Llama-3, which swaps one end token for another
        file = folder / "tokenizer_config.json"
        config = json.loads(file.read_text())
        file.write_text(json.dumps(config | {"bos_token": config["eos_token"]}))

    def scale(folder):
        file = folder / "adapter_config.json"
        file.write_text(file.read_text().replace('"lora_alpha": 32', '"lora_alpha": 3'))

    base = load_model(tiny_folder).fingerprint
    assert edited("same", lambda folder: None) == base
    found = {each.__name__: edited(each.__name__, each) for each in (weights, template, config, tokenizer, special)}
    assert len({base, *found.values()}) == 6, found
    shutil.copytree(lower, tmp_path / "scaled" / "lower")
    scale(tmp_path / "scaled" / "lower")
    adapters = (lower, str(tmp_path / "scaled" / "lower"))
    assert len({base, *(load_model(tiny_folder, adapter=a).fingerprint for a in adapters)}) == 3


def test_an_adapter_whose_weights_fit_nowhere_is_refused(tiny_folder, lower):
    file = Path(lower) / "adapter_model.safetensors"
    renamed = {key.replace(".layers.", ".language_model.layers."): value for key, value in load_file(file).items()}
    save_file(renamed, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"lower: it lacks .*layers\.0\.mlp\.down_proj\.lora_A"):
        load_model(tiny_folder, adapter=lower)


@pytest.mark.parametrize("kind", ["IA3", "LoRA of the embedding"])
def test_an_adapter_of_whole_numbers_is_named_and_not_rounded(tiny_folder, tmp_path, kind):
    from peft import IA3Config

    ia3 = IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    lora = LoraConfig(target_modules=["embed_tokens"], task_type="CAUSAL_LM", init_lora_weights=False)
    net = get_peft_model(load_model(tiny_folder).net, ia3 if kind == "IA3" else lora)
    net.peft_config["default"].base_model_name_or_path = tiny_folder
    net.save_pretrained(tmp_path)
    load_model(str(tmp_path))
    file = tmp_path / "adapter_model.safetensors"
    save_file({key: (value * 3).to(torch.int8) for key, value in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(UserError, match="is I8, not floating point"):
        load_model(str(tmp_path))


def test_torn_files_and_odd_names_are_one_line(tiny_folder, lower, tmp_path):
    torn = tmp_path / "torn"
    shutil.copytree(tiny_folder, torn)
    whole = (torn / "model.safetensors").read_bytes()
    (torn / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"torn/model\.safetensors: not a whole safetensors file"):
        load_model(str(torn))
    with pytest.raises(UserError, match="--dtype nn"):
        load_model(tiny_folder, dtype="nn")
    (tmp_path / "latin.jinja").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"latin\.jinja"):
        load_model(tiny_folder, chat_template=str(tmp_path / "latin.jinja"))
    (Path(lower) / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match=r"adapter_config\.json: can't be read"):
        load_model(lower)


@pytest.mark.parametrize("name", ["bpe.codes", "source.spm", "prophetnet.tokenizer"])
def test_a_slow_tokenizers_files_are_part_of_the_fingerprints(tiny_folder, tmp_path, name):
    folder, found = Path(shutil.copytree(tiny_folder, tmp_path / "model")), set()
    for text in ("a b", "a c"):
        (folder / name).write_text(text)
        found |= {load_model(str(folder)).fingerprint, disk_fingerprint(ModelSettings(model=str(folder)))}
    assert len(found) == 4


@pytest.mark.skipif(sys.platform != "linux", reason="the file is Linux's")
def test_a_text_that_can_not_be_read_is_one_line(tiny_folder, tmp_path):
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    (folder / "README.txt").symlink_to("/proc/self/mem")
    refused(folder, f"{folder / 'README.txt'}: can't be read")


@torch.no_grad()
def test_the_layers_are_the_decoders_where_an_image_encoder_has_more():
    width = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    text = width | {"vocab_size": 64, "num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 8}
    vision = width | {"num_hidden_layers": 5, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=7)
    net = AutoModelForCausalLM.from_config(config)
    layers = Model("m", net, None, "m").layers
    assert len(layers) == 2 and all("vision" not in type(layer).__name__.lower() for layer in layers)
    wrapped = get_peft_model(net, LoraConfig(target_modules=r".*language_model.*q_proj"))
    assert Model("m", wrapped, None, "m").layers == layers


def test_a_model_is_set_aside_where_it_can_be_moved():
    def away(device: str, **more) -> list[str]:
        seen: list[str] = []
        net = SimpleNamespace(to=lambda where: seen.append(str(where)), **more)
        with parked_on_cpu(SimpleNamespace(device=torch.device(device), net=net)):
            seen.append("within")
        return seen

    assert away("cuda") == ["cpu", "within", "cuda"]
    assert away("cpu") == ["within"] == away("cuda", hf_device_map={"": 0})
