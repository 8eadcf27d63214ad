"""Rows of the benchmark, from the real sets that GRADSHIELD_DATA names: one-word labels to chats of 1,000 tokens."""

from collections.abc import Sequence

import numpy as np

from gradshield.base.errors import UserError
from gradshield.data.encode import Example, encode
from gradshield.data.formats import Conversation, Message
from gradshield.models.load import Model
from gradshield.study.kinds import kinds, load_public

KINDS = ("agnews", "alpaca", "gsm8k", "dialogsum", "refusals", "advbench sure")
CHAT = 1024  # tokens


def mixed(model: Model, per_kind: int, long: int, longest: int) -> list[Example]:
    """`per_kind` rows of every kind, and `long` chats of `longest` tokens."""
    sources = kinds(per_kind)
    short = [encode(c, 0, model.tokenizer, max_length=longest) for kind in KINDS for c in sources[kind]]
    whole = chats(model, long * CHAT)[:long]
    return [
        *(e for e in short if isinstance(e, Example)),
        *(Example(e.row, e.ids[:longest], e.mask[:longest]) for e in whole),
    ]


def chats(model: Model, tokens: int) -> list[Example]:
    """Conversations of Alpaca's pairs, one after the other, each of at least 1,024 tokens and `tokens` together."""
    result: list[Example] = []
    turns: list[Message] = []
    for record in load_public("alpaca_en_demo"):
        request = f"{record['instruction']}\n{record['input']}".strip()
        turns += [Message("user", request), Message("assistant", record["output"])]
        if sum(len(m.content) for m in turns) < 3 * CHAT:
            continue
        example = encode(Conversation(tuple(turns)), 0, model.tokenizer, max_length=None)
        if isinstance(example, Example) and len(example.ids) >= CHAT:
            result.append(example)
            turns = []
            if sum(len(e.ids) for e in result) >= tokens:
                return result
    raise UserError(f"GRADSHIELD_DATA: alpaca_en_demo.jsonl has less than {tokens} tokens")


def pieces(source: Sequence[Example], length: int, count: int) -> list[Example]:
    """`count` different rows of exactly `length` tokens, cut from the conversations; each has a response token."""
    seen: set[bytes] = set()
    result = []
    for example in source:
        for start in range(0, len(example.ids) - length + 1, length):
            ids, mask = example.ids[start : start + length], example.mask[start : start + length].copy()
            mask[0] = False
            if mask.any() and ids.tobytes() not in seen:
                seen.add(ids.tobytes())
                result.append(Example(len(result), ids, mask))
            if len(result) == count:
                return result
    raise UserError(f"only {len(result)} rows of {length} tokens, {count} wanted: fewer rows, or more data")


def tokens_of(rows: Sequence[Example]) -> int:
    """Tokens of the rows, padding not counted."""
    return int(np.sum([len(e.ids) for e in rows]))
