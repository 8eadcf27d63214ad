"""The model that a benchmark runs on: the product's own, a folder, or random weights in a named shape."""

from pathlib import Path
from typing import Any

import torch

from gradshield.models.load import Model, embedded_gguf, load_model
from gradshield.models.network import quiet_loading

LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
    "rope_theta": 500_000.0,
}
VOCABULARY = 49_152  # the embedded model's, whose tokenizer encodes for random weights, too


def open_model(spec: str, device: str | None = None, dtype: str | None = None) -> Model:
    """The model of a spec: "embedded", a folder, "llama-3.1-8b", or LAYERSxWIDTH (say "12x256") of random weights.

    Raises UserError where a folder holds no model.
    """
    shape = _shape(spec)
    if shape is None:
        return load_model(spec, device=device, dtype=dtype)
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    folder, file = embedded_gguf()
    with quiet_loading():
        tokenizer = AutoTokenizer.from_pretrained(str(folder), gguf_file=file)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype or "float32"))
    try:
        with torch.device(device):
            net: Any = LlamaForCausalLM(LlamaConfig(**shape)).train(False)
    finally:
        torch.set_default_dtype(before)
    net.requires_grad_(False)
    return Model(spec, net, tokenizer, spec)


def label(spec: str) -> str:
    """The spec without anything of this machine in it: a folder's last name."""
    return Path(spec).name or spec


def weights(model: Model) -> int:
    """Parameters that a token goes through: the decoder's Linears and the head."""
    head = model.net.get_output_embeddings().weight.numel()
    return head + sum(m.weight.numel() for m in model.linears.values())


def _shape(spec: str) -> dict | None:
    if spec == "llama-3.1-8b":
        return LLAMA_8B
    layers, _, width = spec.partition("x")
    if not (layers.isdigit() and width.isdigit()):
        return None
    heads = max(1, int(width) // 64)
    return {
        "hidden_size": int(width),
        "intermediate_size": int(width) * 8 // 3,
        "num_hidden_layers": int(layers),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
    }
