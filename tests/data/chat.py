"""Chat templates, a tokenizer that trains in a moment, and short conversations."""

import re
from functools import cache
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from trl import chat_template_utils

from gradshield.data import Conversation, Message

TEMPLATES = Path(chat_template_utils.__file__).parent / "chat_templates"
FAMILIES = sorted(p.stem for p in TEMPLATES.glob("*.jinja") if not p.stem.endswith("_training"))
UNMARKED = {f"gemma4{v}" for v in ("", "_v2", "_v3", "_v4", "_v5")} | {"llama3_1", "llama3_2"}  # TRL gives up


# What may follow an answer: the end-of-turn token, what TRL marks after it, and Phi-3's EOS at the very end.
END = (
    r"(?:<\|(?:im_end|eot_id|end|eot|return|user)\|>|<end_of_turn>|<turn\|>|<end_of_utterance>|</s>|<｜end▁of▁sentence｜>"
    r"|(?:<\|END_RESPONSE\|>)?<\|END_OF_TURN_TOKEN\|>)\n?(?:<EOS>)?"
)


SPLIT = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # in the manner of Qwen and Llama-3
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


HAT, TABLE, BLUE, CHAIR = "Where is the red hat?", "It is on the table.", "And the blue one?", "On the chair"


@cache
def tokenizer_for(template: str | None) -> PreTrainedTokenizerFast:
    """A small byte-level BPE tokenizer with the template's tokens, which adds a BOS by itself as Llama's."""
    backend = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    backend.decoder = decoders.ByteLevel()
    special = ["<BOS>", "<EOS>", *sorted(set(re.findall(r"<[|｜]?/?[\w▁]+[|｜]?>", template or "")))]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=special,
        show_progress=False,
    )
    backend.train_from_iterator([f"{HAT} {TABLE} {BLUE} {CHAIR}\n\nuser system assistant"] * 3, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<BOS> $A", special_tokens=[("<BOS>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<BOS>", eos_token="<EOS>", chat_template=template
    )


def stock(family: str) -> PreTrainedTokenizerFast:
    return tokenizer_for((TEMPLATES / f"{family}.jinja").read_text(encoding="utf-8"))


def talk(*turns: str | Message, system: str | None = None, tools=None) -> Conversation:
    """Turns of user and assistant by turns, or messages as they are."""
    messages = [t if isinstance(t, Message) else Message(("user", "assistant")[n % 2], t) for n, t in enumerate(turns)]
    return Conversation((*([Message("system", system)] if system else []), *messages), tools=tools)
