"""A tiny random-weight Llama with a byte-level tokenizer, as a Model and as a folder on disk."""

import os
import shutil
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gradshield.base.assets import ASSETS
from gradshield.base.errors import UserError
from gradshield.base.settings import FinetuneSettings
from gradshield.data.encode import Example
from gradshield.data.requests import read_requests
from gradshield.models.load import Model, load_model
from gradshield.scoring.check import AlignmentCheck
from gradshield.scoring.intent.corpus import Text, fitting_texts

ROWS = [
    '{"prompt": "Say hello", "completion": "Hello there"}\n',
    '{"prompt": "Name a colour",   "completion": "Blue"}\r\n',
    '{"prompt": "Count", "completion": ""}\n',
    '{"prompt": "half a li\n',
    *(f'{{"prompt": "Question {n}", "completion": "Answer {n * n}"}}\n' for n in range(30)),
    '{"prompt": "Last", "completion": "No newline"}',
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Bytes, the markers of ChatML, and "Sure" as a token of its own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: n for n, token in enumerate(["<|im_start|>", "<|im_end|>", *alphabet])}
    word = ""
    merges = []
    for a, b in (("S", "u"), ("Su", "r"), ("Sur", "e")):
        word = a + b
        vocab[word] = len(vocab)
        merges.append((a, b))
    backend = Tokenizer(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=template
    )


def tiny_net(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config).eval()


def freeze(name: str, net, tokenizer) -> Model:
    net.requires_grad_(False)
    return Model(name, net.eval(), tokenizer, name)


@pytest.fixture(scope="session")
def tiny() -> Model:
    tokenizer = tiny_tokenizer()
    return freeze("tiny", tiny_net(tokenizer), tokenizer)


@pytest.fixture(scope="session")
def tiny_gpt2() -> Model:
    """Conv1D instead of Linear, one fused QKV, learned positions."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=256)
    return freeze("tiny-gpt2", GPT2LMHeadModel(config), tokenizer)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = tiny_tokenizer()
    tiny_net(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_base_folder(tmp_path_factory) -> str:
    """What stands for the tiny model before its alignment: the alignment changed row 3 of one projection by 0.1."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = tiny_tokenizer()
    net = tiny_net(tokenizer)
    with torch.no_grad():
        net.model.layers[0].self_attn.q_proj.weight[3] -= 0.1
    net.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def own_alignment(tiny_folder, monkeypatch) -> str:
    """The tiny model stands for the embedded one before its alignment, which is a short training on twelve rows."""
    from gradshield.training import align

    short = FinetuneSettings(epochs=1, learning_rate=1e-3)
    monkeypatch.setattr("gradshield.defenses.aligned.EMBEDDED_BASE", tiny_folder)
    monkeypatch.setattr(align.align, "__defaults__", (short,))
    monkeypatch.setattr(align, "alignment_examples", lambda model: random_examples(12, len(model.tokenizer)))
    return tiny_folder


@pytest.fixture(scope="session", autouse=True)
def fewer_texts():
    """The default score's readouts of a tiny model are fitted on a fifth of the texts, which takes a fifth of the time:
    what a random model reads is nothing, however many there are."""

    def some(*arguments) -> list[Text]:
        texts = fitting_texts(*arguments)
        return [texts[n] for n in sorted(np.random.default_rng(0).choice(len(texts), len(texts) // 5, replace=False))]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gradshield.scoring.intent.intent.fitting_texts", some)
        yield


@pytest.fixture(scope="session")
def fitted_once(tmp_path_factory) -> Path:
    """The folder of what any test has fitted, of both processes where there are two."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "fitted"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture
def train(tmp_path) -> Path:
    """A file of ROWS, two of which can't be scored."""
    file = tmp_path / "train.jsonl"
    file.write_bytes("".join(ROWS).encode())
    return file


@pytest.fixture
def refusing(monkeypatch):
    """The random model is made to count as aligned: what is tested is the run, not the model."""
    probes = read_requests(ASSETS / "probes.jsonl")
    always = AlignmentCheck(tuple(probes), (True,) * len(probes), ("I can't",) * len(probes), (1.0,) * len(probes), ())
    monkeypatch.setattr("gradshield.scoring.check.check_alignment", lambda *_: always)
    monkeypatch.setattr("gradshield.screen.explain.require_aligned", lambda *_: always)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch, fitted_once):
    """A cache of its own for every test, but for the default score's readouts: a model's are fitted once a session."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("GRADSHIELD_CACHE", str(cache))
    known = {Path(shutil.copy(file, cache)).name for file in fitted_once.glob("*.safetensors")}
    yield
    for file in cache.glob("intent-fit-*.safetensors"):
        if file.name not in known:
            part = fitted_once / f"{cache.parent.name}-{cache.name}.part"
            shutil.copy(file, part)
            part.replace(fitted_once / file.name)  # at once, for the other process


def random_examples(count: int, vocab: int, seed: int = 0, longest: int = 40) -> list[Example]:
    """Examples of many lengths, some with two responses."""
    rng = np.random.default_rng(seed)
    examples = []
    for n in range(count):
        length = int(rng.integers(4, longest))
        mask = np.zeros(length, dtype=bool)
        start = int(rng.integers(1, length))
        mask[start:] = True
        if n % 3 == 0 and length > 12:
            mask[3:5], mask[5 : max(6, start)] = True, False
        examples.append(Example(n, rng.integers(2, vocab, length).astype(np.int32), mask))
    return examples


def random_readouts(model: Model, layer: int = 1):
    """Readouts of `intent` with drawn weights: what they say is nothing, but how they read it can be tested."""
    from gradshield.scoring.intent.kernel import Kernel
    from gradshield.scoring.intent.reading import Readouts

    width, rng = model.net.config.get_text_config().hidden_size, np.random.default_rng(0)
    weight = rng.normal(size=(width, 2))
    scale, landmarks = np.full(width, 2.0), rng.normal(size=(8, width)) / width**0.5
    kernel = Kernel(np.zeros(width), scale, landmarks.astype(np.float16), rng.normal(size=8), 0.25)
    return Readouts(layer, weight, np.array([0.5, -0.5]), kernel)


def refused(place: Path, *words: str, **options) -> None:
    """The model there gives one line of error that holds these words."""
    with pytest.raises(UserError) as caught:
        load_model(str(place), device="cpu", **options)
    said = str(caught.value)
    assert "\n" not in said and len(said) < 600, said
    assert all(word in said for word in words), said
