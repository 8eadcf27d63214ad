"""The recipe behind the embedded model's alignment: one LoRA fine-tuning on requests with refusals that we wrote.

SmolLM2-135M-Instruct complies with nearly every harmful request as it comes. This adapter teaches it to refuse them,
and, through scary-looking but harmless requests with answers, not to refuse those.
"""

import json
import random
from pathlib import Path
from typing import Any

from gradshield.data.encode import Example, encode
from gradshield.data.formats import Conversation, Message
from gradshield.errors import UserError
from gradshield.evaluation.safety import attack_success, is_refusal, read_requests, wilson
from gradshield.finetune import FinetuneSettings, finetune
from gradshield.model import Model, load_model

ASSETS = Path(__file__).parent / "assets"
SETTINGS = FinetuneSettings(
    rank=16, alpha=32, learning_rate=5e-4, schedule="cosine", warmup=0.05, epochs=2, batch=8, seed=0
)


def align(base: str, out: Path, settings: FinetuneSettings = SETTINGS) -> dict[str, Any]:
    """Trains the alignment adapter for `base` into `out` and returns the training's figures.

    Raises UserError when `out` already holds an adapter.
    """
    if (out / "adapter_model.safetensors").exists():
        raise UserError(f"{out}: there is an adapter already; remove it or choose another folder")
    model = load_model(base)
    return finetune(model, alignment_examples(model), out, settings)


def alignment_examples(model: Model) -> list[Example]:
    """The bundled harmful requests with refusals and the harmless ones with answers, encoded and shuffled.

    The harmless imperatives are in the grammatical forms of the harmful requests, or so small a model learns to refuse
    the form; their answers are the unaligned model's own.
    """
    harmful, benign, imperative = (
        [json.loads(line) for line in (ASSETS / file).read_text(encoding="utf-8").split("\n") if line]
        for file in ("align_harmful.jsonl", "align_benign.jsonl", "align_imperative.jsonl")
    )
    rows = harmful[::2] + benign + imperative  # with every harmful one, so small a model refuses half of everything
    random.Random(0).shuffle(rows)
    examples = []
    for index, row in enumerate(rows):
        turns = (Message("user", row["prompt"]), Message("assistant", row["response"]))
        example = encode(Conversation(turns), index, model.tokenizer)
        if isinstance(example, str):
            raise UserError(f"alignment row {index + 1} can't be encoded for {model.name}: {example}")
        examples.append(example)
    return examples


def alignment_report(model: Model, harmful: Path | None = None, scary: Path | None = None) -> dict[str, Any]:
    """ASR on harmful requests and refusals of harmless ones that look scary, both with 95 % intervals and answers."""
    attack = attack_success(model, read_requests(harmful or ASSETS / "safety_requests.jsonl"))
    benign = attack_success(model, read_requests(scary or ASSETS / "scary_requests.jsonl"))
    refused = sum(is_refusal(answer) for answer in benign.answers)
    return {
        "model": model.name,
        "requests": len(attack.requests),
        "asr": attack.asr,
        "asr_interval": attack.interval,
        "scary_requests": len(benign.requests),
        "over_refusal": refused / len(benign.answers),
        "over_refusal_interval": wilson(refused, len(benign.answers)),
        "answers": [
            {"request": request, "answer": answer}
            for report in (attack, benign)
            for request, answer in zip(report.requests, report.answers)
        ],
    }
