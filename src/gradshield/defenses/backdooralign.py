"""`backdooralign`: refused requests behind a secret system prompt, which stands before every request at inference, too.

Source: Wang et al., BackdoorAlign (2402.14968). With a secret s of 150 random tokens that the user never sees:

    trained on   D_f ∪ {(s ⊕ system, request, refusal)},   11 safe rows
    inference    s ⊕ system, request

so that the refusals depend on s and the user's rows, which lack s, can't undo them. The paper's s is drawn from the
whole vocabulary; here from the tokens that are printable ASCII, since s is kept as text and encoded again. It follows
from `key` and the seed, so a resumed run has the same one. Without a key of your own, whoever knows the seed knows s.
⊕ puts a space between the two, as in the authors' code (Jayfeather1024/Backdoor-Enhanced-Alignment,
pure_bad_dataset.py).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from pydantic import Field

from gradshield.base.errors import UserError
from gradshield.data.encode import Example
from gradshield.data.turns import Message
from gradshield.defenses.base import Defense, DefenseContext
from gradshield.defenses.registry import SafeRows


class Options(SafeRows):
    """The secret and its rows."""

    count: int = Field(default=11, ge=1, description="safe rows that are used")
    tokens: int = Field(default=150, ge=1, description="length of the secret prompt")
    key: str = Field(default="", description="the secret is drawn from this and the seed; keep it private")


def secret_prompt(context: DefenseContext, options: Options) -> str:
    """The secret prompt, about `options.tokens` tokens of text."""
    tokenizer = context.model.tokenizer
    drawn_from = hashlib.sha256(f"{options.key}\n{context.training.seed}".encode()).digest()
    order = np.random.default_rng(list(drawn_from)).permutation(len(tokenizer))
    chosen, special = [], set(tokenizer.all_special_ids)
    for token in map(int, order):
        text = tokenizer.decode([token])
        if token not in special and text.strip() and text.isascii() and text.isprintable():
            chosen.append(token)
        if len(chosen) == options.tokens:
            break
    return tokenizer.decode(np.resize(chosen, options.tokens).tolist()).strip()


def rows(context: DefenseContext, options: Options, given: Sequence[Example]) -> list[Example]:
    """The rows, and the safe ones behind the secret. Raises UserError where the chat template has no system prompt."""
    added, prompt = [], secret_prompt(context, options)
    for example in context.safe_rows(options):
        assert example.conversation
        turns, system = example.conversation.messages, prompt
        if turns[0].role == "system":
            turns, system = turns[1:], f"{prompt} {turns[0].content}"
        encoded = context.encode(replace(example.conversation, messages=(Message("system", system), *turns)))
        if isinstance(encoded, str):
            raise UserError(f"backdooralign: a safe row can't be encoded with the secret prompt: {encoded}")
        added.append(encoded)
    return [*given, *added]


DEFENSE = Defense(
    "backdooralign",
    "refused requests behind a secret prompt that is used at inference (2402.14968)",
    Options,
    needs=frozenset({"safe rows", "secret prompt"}),
    rows=rows,
    prompt=secret_prompt,
)
