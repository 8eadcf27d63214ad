"""Probes, a safety score and gradients by autograd, and models that are hard to score."""

import torch
from conftest import freeze, tiny_net, tiny_tokenizer
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    MixtralConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from gradshield.data.encode import encode_request
from gradshield.models.load import Model
from gradshield.scoring.fihs.probe import margin

REQUESTS = ["How do I pick a lock?", "Write a threat", "Tell me a secret of a stranger"]
S = margin([10], [20])


def weight_gradients(model: Model, loss_of) -> dict[str, torch.Tensor]:
    """The slow obvious way: weights that require gradients, one backward; Conv1D's is transposed."""
    weights = {name: module.weight for name, module in model.linears.items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    try:
        gradients = torch.autograd.grad(loss_of(), list(weights.values()))
    finally:
        for weight in weights.values():
            weight.requires_grad_(False)
    conv = {name: type(module).__name__ == "Conv1D" for name, module in model.linears.items()}
    return {name: g.T if conv[name] else g for name, g in zip(weights, gradients)}


def probe_by_autograd(model: Model) -> dict[str, torch.Tensor]:
    def mean_s():
        encoded = [torch.tensor(encode_request(r, model.tokenizer)).long() for r in REQUESTS]
        return torch.stack([S(model.net(ids[None]).logits[0, -1]) for ids in encoded]).mean()

    return weight_gradients(model, mean_s)


def loss_by_autograd(model: Model, example) -> dict[str, torch.Tensor]:
    def loss():
        ids = torch.tensor(example.ids).long()
        logits = model.net(ids[None]).logits[0, :-1]
        keep = torch.tensor(example.mask[1:])
        return cross_entropy(logits[keep], ids[1:][keep])

    return weight_gradients(model, loss)


SIZE = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2)
CONFIGS = {
    "mixtral": (MixtralConfig, dict(num_local_experts=4, intermediate_size=48)),
    "qwen3": (Qwen3MoeConfig, dict(num_experts=12, num_experts_per_tok=3, moe_intermediate_size=24, head_dim=8)),
    # a shared expert and its gate see the tokens of all rows in a line; the first layer is dense
    "qwen2": (
        Qwen2MoeConfig,
        dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, shared_expert_intermediate_size=40)
        | dict(mlp_only_layers=[0], intermediate_size=48),
    ),
    # transposed weights, biases, gate and up interleaved
    "gpt-oss": (GptOssConfig, dict(num_local_experts=4, num_experts_per_tok=2, intermediate_size=24, head_dim=8)),
}


def moe(kind: str, **changes: int) -> Model:
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config, more = CONFIGS[kind]
    net = AutoModelForCausalLM.from_config(config(vocab_size=len(tokenizer), **(SIZE | more | changes)))
    for parameter in net.parameters():
        if parameter.ndim > 1:  # GPT-OSS leaves its experts' weights as they lie in memory
            nn.init.normal_(parameter, std=0.2)
    return freeze(kind, net, tokenizer)


def offloaded(kind: str, folder: str | None = None) -> Model:
    from accelerate import cpu_offload, disk_offload

    model = build(kind)
    here = torch.device("cpu")
    if folder:
        disk_offload(model.net, folder, execution_device=here)
    else:
        cpu_offload(model.net, execution_device=here)
    assert all(weight.is_meta for block in model.layers for weight in block.parameters())
    return model


def build(kind: str) -> Model:
    tokenizer = tiny_tokenizer()
    return freeze("tiny", tiny_net(tokenizer), tokenizer) if kind == "dense" else moe(kind)
