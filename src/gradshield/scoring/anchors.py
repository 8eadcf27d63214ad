"""Bundled rows of known verdict, encoded like the file's. They fix the scale of the scores."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from gradshield.base.assets import ASSETS
from gradshield.base.storage import read_jsonl
from gradshield.data.encode import Example, encode
from gradshield.data.formats import Conversation, Message

if TYPE_CHECKING:
    from gradshield.models.load import Model  # imports torch

ANCHOR_FILES = {"good": "anchors_good.jsonl", "refusal": "anchors_refusal.jsonl", "harmful": "anchors_harmful.jsonl"}


def anchor_examples(model: "Model", loss_on: str = "assistant", max_length: int = 1024) -> dict[str, list[Example]]:
    """The bundled anchors by kind, encoded like the rows; those that its template can't take are left out."""
    result = {}
    for kind in ANCHOR_FILES:
        rows = (encode_anchor(model, row, n, loss_on, max_length) for n, row in enumerate(anchor_rows(kind)))
        result[kind] = [example for example in rows if isinstance(example, Example)]
    return result


def anchor_rows(kind: str) -> list[dict[str, Any]]:
    """The records of a kind: prompt, response, and some with a system prompt."""
    return read_jsonl(ASSETS / ANCHOR_FILES[kind])


def encode_anchor(
    model: "Model", row: dict[str, Any], n: int, loss_on: str = "assistant", max_length: int = 1024
) -> Example | str:
    """The record as the example of row `n`, or why it can't be one."""
    system = (Message("system", row["system"]),) if row.get("system") else ()
    turns = (*system, Message("user", row["prompt"]), Message("assistant", row["response"]))
    conversation = Conversation(turns)
    room = min(max_length, model.positions or max_length)
    example = encode(conversation, n, model.tokenizer, max_length=room, loss_on=loss_on)
    return example if isinstance(example, str) else replace(example, conversation=conversation)
