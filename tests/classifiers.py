"""A tiny random sequence classifier in a folder."""

from pathlib import Path

import torch
from conftest import tiny_tokenizer
from transformers import BertConfig, BertForSequenceClassification


def save_classifier(folder: Path, labels: list[str], swap: bool = False) -> str:
    """Saves it and returns the folder. `swap` exchanges what the labels stand for."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        initializer_range=0.5,
        id2label=dict(enumerate(labels)),
        label2id={label: n for n, label in enumerate(labels)},
    )
    net = BertForSequenceClassification(config)
    if swap:
        with torch.no_grad():
            net.classifier.weight.copy_(net.classifier.weight.flip(0))
            net.classifier.bias.copy_(net.classifier.bias.flip(0))
    net.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
