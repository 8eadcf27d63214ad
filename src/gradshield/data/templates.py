"""What a chat template writes around an answer, found once per tokenizer, and the rendering itself.

Chat templates differ widely: most do not mark the assistant's text, some write an empty think block before an answer,
some open a block that only the model can close, some name a channel first. Rendering one question and one answer in
four ways shows all of this. Positions here are characters of the rendered text; `encode.py` converts them to tokens.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from gradshield.base.deadline import memory_limit, time_limit
from gradshield.base.errors import UserError, one_line
from gradshield.data.turns import Message

LIMIT = 5.0  # seconds for a template to render one row; common ones take a millisecond
MEMORY = 1 << 29  # bytes for the same; a row has ten million at most
LONGEST = 1 << 22  # characters that a template may write for one request; tokenising more takes minutes
MOST_FAILED = 3  # conversations that a template may fail to render within the limits; each can cost LIMIT seconds
_SHORT = 100_000  # characters of a conversation which needs no such time or memory: the template is at fault
Span = tuple[int, int]  # characters [start, end) of the rendered text

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_THINKING = re.compile(r"(?<![\w.'\"])(?:enable_)?thinking\b")  # the variables, not the field of a message
_QUESTION, _ANSWER = "Where is it?", "Xyzzy"  # words that no template writes by itself
_forms: WeakKeyDictionary = WeakKeyDictionary()  # tokenizer → {chat template: Form}
_failed: WeakKeyDictionary = WeakKeyDictionary()  # tokenizer → short conversations not rendered within the limits


class Refused(Exception):
    """The chat template raised for these messages; the message is its own, on one line."""


@dataclass(frozen=True)
class Form:
    """The properties of one chat template that do not depend on the row."""

    template: str  # the tokenizer's own, as used at inference
    training: str | None  # with {% generation %} markers: its own, or TRL's training version, or None
    parts: bool  # content must be a list of parts (templates of vision models)
    thinking: dict[str, bool]  # the variables that switch thinking off
    closing: str = ""  # what must follow the generation prompt before a plain answer
    openings: tuple[str, ...] = ()  # what precedes an answer and is not the model's to say, longest first


def form_of(tokenizer, tools: list | None = None) -> Form:
    """The tokenizer's Form, found once and kept as long as the tokenizer lives.

    Raises UserError where the tokenizer has no chat template, or can't say where its tokens lie in the text.
    """
    name = tokenizer.name_or_path or "this model"
    try:
        template = tokenizer.get_chat_template(tools=tools)
    except ValueError:
        advice = "pass --chat-template FILE or use rows with plain text"
        raise UserError(f"the tokenizer of {name} has no chat template; {advice}") from None
    if not tokenizer.is_fast:
        advice = "use one with a tokenizer.json"
        raise UserError(f"the tokenizer of {name} can't say where its tokens lie in the text; {advice}")
    known = _forms.setdefault(tokenizer, {})
    if template not in known:
        known[template] = _find_form(tokenizer, template)
    return known[template]


def _find_form(tokenizer, template: str) -> Form:
    """Probe the template with one question and one answer, and see what it writes around them."""
    training = _training_template(tokenizer, template)
    thinking = {name: False for name in sorted(set(_THINKING.findall(template)))}
    question, answer = Message("user", _QUESTION), Message("assistant", _ANSWER)
    for parts in (False, True):
        form = Form(template, training, parts, thinking)
        try:
            texts = (
                render_template(tokenizer, form, [question])[0],
                render_template(tokenizer, form, [question], generation_prompt=True)[0],
                render_template(tokenizer, form, [question], generation_prompt=True, variables=thinking)[0],
                render_template(tokenizer, form, [question, answer], training=bool(training))[0],
            )
            if any("'type': 'text'" in text for text in texts):  # the list itself, by a template that rewrites texts
                continue
            # Only what follows the question counts: system prompts and dates come before it.
            alone, prompt, request, answered = [text.split(_QUESTION, 1)[1] for text in texts]
            answered = answered[: answered.index(_ANSWER)]
        except (Refused, IndexError, ValueError):  # it does not take content in this form, or drops it
            continue
        closing = _closing(request, answered)
        # A space in front of an answer belongs to its first word, and is the model's to say.
        openings = {_after_shared_start(text, alone).rstrip(" ") for text in (prompt, request + closing, answered)} - {
            ""
        }
        openings = tuple(sorted(openings, key=len, reverse=True))
        return Form(template, training, parts, thinking, closing, openings)
    return Form(template, training, False, thinking)  # the rows will say what the template holds against them


def _training_template(tokenizer, template: str) -> str | None:
    """What TRL's SFTTrainer trains with under `assistant_only_loss`, None where it would give up."""
    if _GENERATION.search(template):
        return template
    from trl.chat_template_utils import get_training_chat_template

    try:
        with time_limit(LIMIT), memory_limit(MEMORY):  # it renders messages with the template, too
            return get_training_chat_template(tokenizer)
    except Exception:  # TRL's ValueError for a family unknown to it, or what an unknown template raised
        return None


def _closing(request: str, answered: str) -> str:
    """What must follow a generation prompt so that the next token is the first of a plain answer.

    Mostly nothing. Harmony names the channel, some hybrid templates write an empty think block only with the
    answer, and a think block that the prompt opens (DeepSeek-R1) is closed. Spaces at the end belong to the
    answer's first word.
    """
    if answered.startswith(request):
        return answered[len(request) :].rstrip(" ")
    if request.rfind("<think>") > request.rfind("</think>"):
        return "\n</think>\n\n"
    written = answered.rstrip()  # GLM-4.5 adds "/nothink" to the question, so that only the ends are alike
    return answered[len(written) :].rstrip(" ") if written and request.endswith(written) else ""


def _after_shared_start(text: str, other: str) -> str:
    differ = (n for n, (a, b) in enumerate(zip(text, other)) if a != b)
    return text[next(differ, min(len(text), len(other))) :]


def render_template(
    tokenizer,
    form: Form,
    messages: Sequence[Message],
    tools: list | None = None,
    *,
    training: bool = False,
    generation_prompt: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> tuple[str, list[Span]]:
    """(text, spans inside {% generation %} blocks) of the messages; no spans unless `training`. Raises
    Refused, and UserError for a template that keeps exceeding its time or memory."""
    # What tokenizer.apply_chat_template calls, which keeps the spans to itself.
    from transformers.utils.chat_template_utils import render_jinja_template

    turns = [_as_dict(message, form.parts) for message in messages]
    try:
        with time_limit(LIMIT), memory_limit(MEMORY):
            rendered: Any = render_jinja_template(  # (texts, spans), whatever its signature says
                [turns],
                tools=tools,
                chat_template=form.training if training else form.template,
                return_assistant_tokens_mask=training,
                add_generation_prompt=generation_prompt,
                **{**tokenizer.special_tokens_map, **(variables or {})},
            )
    except Exception as error:  # jinja's errors, and Python's own from inside a foreign template
        if isinstance(error, TimeoutError | MemoryError) and len(str((turns, tools))) <= _SHORT:
            _failed[tokenizer] = _failed.get(tokenizer, 0) + 1
            if _failed[tokenizer] >= MOST_FAILED:
                name = getattr(tokenizer, "template_name", f"the chat template of {tokenizer.name_or_path}")
                raise UserError(
                    f"{name} failed on {MOST_FAILED} conversations, the last of {len(turns)} messages: {error}; "
                    "pass another with --chat-template"
                ) from None
        raise Refused(one_line(error, 1000) or type(error).__name__) from None
    (text,), spans = rendered
    return text, spans[0] if training else []


def _as_dict(message: Message, parts: bool) -> dict:
    """What the template is given: the turn as the row has it, where that is known, less its nulls, as in
    transformers' apply_chat_template."""
    fields = {"role": message.role, "content": message.content, **(message.extra or {})}
    fields = {name: value for name, value in (message.raw or fields).items() if value is not None}
    if parts and isinstance(fields.get("content"), str):
        fields["content"] = [{"type": "text", "text": fields["content"]}]
    return fields
