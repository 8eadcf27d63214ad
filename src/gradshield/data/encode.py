"""Conversations → examples: ids and the response mask as fine-tuning would see them, or the reason why not.

TRL's SFTTrainer is the measure. `loss_on="assistant"` is its `assistant_only_loss`: the tokenizer's template
where that marks the assistant's text, else TRL's training version of the family. `"last"` is its
prompt-completion form, `"all"` its plain one. A template that nobody has marked is read by prefixes: a turn
lies between the conversation up to it and the conversation through it, and the whole conversation must begin
with both. Nothing is tokenised apart: turns are found in the rendered text, and their tokens by offsets.

The mask departs from TRL's in one respect: what the generation prompt supplies at inference is no response
token. So an empty think block before an answer is left out, and so is a header that a training template marks
with the answer (the "\\n" of Qwen2.5, "Assistant" of DeepSeek, the channel of gpt-oss). The end is TRL's: the
end-of-turn token is in, and the newline after it where TRL's version of the family marks it (Gemma, Qwen,
LFM2, Phi-3, Nemotron; for GLM-4.5 the token of the next turn, which ends an answer there), else not.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonprefix

import numpy as np

from gradshield.base.errors import UserError
from gradshield.data.formats import Conversation
from gradshield.data.templates import LONGEST, Form, Refused, Span, form_of, render_template
from gradshield.data.tokens import Untokenized, tokenize
from gradshield.data.turns import Message, required_texts

Located = tuple[str, list[Span], Sequence[int]]  # the rendered text, the spans of its responses, whose turns they are
_FEW_TURNS = 8  # are all rendered, wherever the row is cut


@dataclass(frozen=True)
class Example:
    """A row encoded for a model."""

    row: int  # Row.index
    ids: np.ndarray  # int32 [tokens]
    mask: np.ndarray  # bool [tokens], True at response tokens; mask[0] is False, as nothing predicts it
    conversation: Conversation | None = None  # its text, where a scorer needs it


def encode(
    conversation: Conversation,
    row: int,
    tokenizer,
    *,
    max_length: int | None = 1024,
    loss_on: str = "assistant",
) -> Example | str:
    """The example of a conversation, with at least one token in its mask, or the reason to set the row aside.

    `loss_on`: "assistant" (every assistant turn but those with `train=False`), "last" (the last assistant
    turn) or "all" (every token; always so for plain text, which gets an EOS token as in TRL). Cut on the
    right to `max_length` tokens. Raises UserError where no row can be encoded: no chat template, or no fast
    tokenizer.
    """
    if loss_on not in ("assistant", "last", "all"):
        raise UserError(f'the loss can be on "assistant", "last" or "all" tokens, not on "{loss_on}"')
    if loss_on == "all" and conversation.unlike_trl:
        return conversation.unlike_trl
    if conversation.text is not None:
        text, spans = conversation.text, None
        if tokenizer.eos_token and not text.endswith(tokenizer.eos_token):
            text += tokenizer.eos_token
    else:
        form = form_of(tokenizer, conversation.tools)
        try:
            located = _locate(tokenizer, form, conversation, loss_on, max_length)
        except Refused as error:
            return f"the chat template refuses this conversation: {error}"
        except Untokenized as error:
            return str(error)
        if isinstance(located, str):
            return located
        text, spans = located
    try:
        ids, offsets = tokenize(tokenizer, text, max_length, special=spans is None)
    except Untokenized as error:
        return str(error)
    mask = np.ones(len(ids), dtype=bool) if spans is None else _overlapping(offsets, spans)
    mask[:1] = False
    if not mask[:max_length].any():
        late = mask.any() or any(start >= offsets[-1, 1] for start, _ in spans or () if len(ids))
        return (
            f"the response starts after token {max_length} (raise --max-length)"
            if late
            else "there is no response token"
        )
    return Example(row, ids[:max_length], mask[:max_length])


def encode_request(request: str | list[dict], tokenizer) -> np.ndarray:
    """int32 ids of a user message (or a list of message dicts), up to the position where a plain answer starts.

    The next token is the first of the answer: thinking is off, and `request_form` describes how. Raises UserError if
    the tokenizer has no chat template, or if the template rejects the request or writes unreadable text.
    """
    form = form_of(tokenizer)
    dicts = [{"role": "user", "content": request}] if isinstance(request, str) else request
    fields = [dict(message) for message in dicts]
    messages = [Message(each.pop("role"), each.pop("content", None) or "", extra=each) for each in fields]
    try:
        text, _ = render_template(tokenizer, form, messages, generation_prompt=True, variables=form.thinking)
    except Refused as error:
        raise UserError(f"the chat template refuses the request: {error}") from None
    if len(text) > LONGEST:
        raise UserError(f"the chat template writes {len(text):,} characters for one request; set --chat-template")
    try:
        return tokenize(tokenizer, text + form.closing)[0]
    except Untokenized as error:
        raise UserError(f"the chat template and the request: {error}") from None


def request_form(tokenizer) -> str:
    """A description of what `encode_request` puts between a request and the first token of a plain answer."""
    form, question = form_of(tokenizer), [Message("user", "?")]

    def prompt(variables: dict[str, bool]) -> str:
        return render_template(tokenizer, form, question, generation_prompt=True, variables=variables)[0]

    switched = [f"{name}=False" for name in form.thinking if prompt({name: False}) != prompt({})]
    words = "the chat template's generation prompt" + (f" with {' and '.join(switched)}" if switched else "")
    return words + (f", followed by {form.closing!r}" if form.closing else "")


def _locate(
    tokenizer, form: Form, conversation: Conversation, loss_on: str, limit: int | None
) -> tuple[str, list[Span]] | str:
    """The rendered conversation and the spans of its responses, or the reason why they can't be found."""
    messages = conversation.messages
    how = {"tools": conversation.tools, "variables": conversation.variables}
    marked = loss_on == "assistant" and form.training is not None
    asked = max((k + 1 for k, message in enumerate(messages) if message.prompt), default=0)
    if prompt := messages[:asked]:
        try:  # TRL does, and fails where the template wants a turn that only the completion has
            render_template(tokenizer, form, prompt, **how, training=marked, generation_prompt=True)
        except Refused as error:
            return f"the chat template refuses the prompt by itself: {error}"
    if loss_on == "all":
        text, _ = render_template(tokenizer, form, messages, **how)
        return text, [(0, len(text))]
    assistant = [k for k, message in enumerate(messages) if message.role == "assistant"]
    trained = [k for k in (assistant[-1:] if loss_on == "last" else assistant) if messages[k].train]
    if not trained:
        return "there is no assistant turn to train on"

    if loss_on == "last":
        found = _turns_by_prefix(tokenizer, form, messages[: trained[0] + 1], how, trained, limit)
    elif marked:
        found = _marked_turns(tokenizer, form, messages, how, assistant, trained, limit, asked)
    else:
        found = _turns_by_prefix(tokenizer, form, messages, how, trained, limit)
    if isinstance(found, str):
        return found
    text, spans, trained = found
    spans = [(_skip_opening(text, start, end, form.openings), end) for start, end in spans]
    responses, at = "\0".join(text[start:end] for start, end in spans), 0
    for k in trained:  # a template that drops what it does not know would leave a response of end tokens only
        places = [responses.find(words, at) for words in required_texts(messages[k])]
        if min(places, default=0) < 0:
            return f"the chat template leaves out or rewrites what message {k + 1} says"
        at = min(places, default=at)
    return text, spans


def _marked_turns(
    tokenizer,
    form: Form,
    messages,
    how: dict,
    assistant: Sequence[int],
    trained: Sequence[int],
    limit: int | None,
    asked: int,
) -> Located | str:
    """Turns by {% generation %} blocks; a block is of the last assistant turn that can begin before it. The first
    `asked` messages are a prompt, where TRL has one."""
    text, spans = render_template(tokenizer, form, messages, **how, training=True)
    first = trained[0]
    if len(trained) == len([k for k in assistant if k >= first]):  # what comes before them is a prompt, as TRL has it
        if first == assistant[0] and not asked:
            return text, spans, trained
        before = messages[: asked or first]
        prompt, _ = render_template(tokenizer, form, before, **how, training=True, generation_prompt=True)
        at = _first_difference(tokenizer, prompt, text, limit)
        return text, [(max(start, at), end) for start, end in spans if end > at], trained
    begins, cut = [], _cut(tokenizer, text, limit)
    for k in assistant:
        if k > first and begins[-1] >= cut:
            assistant = assistant[: len(begins)]
            break
        before = render_template(tokenizer, form, messages[:k], **how, training=True)[0] if k else ""
        begins.append(_prefix_length(before, text, tokenizer))
        if begins[-1] is None:
            return f"the chat template rewrites earlier turns, so that message {k + 1} can't be left out"
    owners = [assistant[max(0, bisect_right(begins, start) - 1)] for start, _ in spans]
    trained = [k for k in trained if k in assistant]
    return text, [span for span, owner in zip(spans, owners) if owner in trained], trained


def _turns_by_prefix(
    tokenizer, form: Form, messages, how: dict, trained: Sequence[int], limit: int | None
) -> Located | str:
    """Turns between two renderings: up to a message with the generation prompt, and through the message."""
    text, _ = render_template(tokenizer, form, messages, **how)
    spans, cut = [], _cut(tokenizer, text, limit) if len(trained) > _FEW_TURNS else len(text)
    for n, k in enumerate(trained):
        if spans and spans[-1][1] >= cut:
            return text, spans, trained[:n]
        through = text if k + 1 == len(messages) else render_template(tokenizer, form, messages[: k + 1], **how)[0]
        end = _prefix_length(through, text, tokenizer, messages[k].content)
        start = _response_start(tokenizer, form, messages[: k + 1], how, text, limit)
        if start is None or end is None:
            return f"the chat template rewrites earlier turns, as message {k + 1} (try --loss-on last)"
        if start < end:
            spans.append((start, end))
    return text, spans, trained


def _cut(tokenizer, text: str, limit: int | None) -> int:
    """The character behind the first `limit` tokens of the text. Turns behind it are cut, so nothing is rendered for
    them: each rendering takes as long as all turns before it."""
    _, offsets = tokenize(tokenizer, text, limit)
    return int(offsets[limit - 1, 1]) if limit and len(offsets) >= limit else len(text)


def _response_start(tokenizer, form: Form, messages, how: dict, text: str, limit: int | None) -> int | None:
    """The start of the last message in the text; None if the template renders the earlier ones differently."""
    if len(messages) == 1:  # a greeting: templates can't render the nothing before it
        words, bare = messages[0].content, messages[0].content.strip()
        words = words if bare and words in text else bare
        header = min((text.find(opening) + len(opening) for opening in form.openings if opening in text), default=0)
        prompt, _ = render_template(tokenizer, form, [Message("user", "?")], generation_prompt=True)
        header += prompt.endswith(" ") and text.startswith(" ", header)
        found = max(text.find(words, header), header)
        own = found > header and text[found - 1] == " " and not prompt.endswith(" ")  # the word's, not the header's
        return found - 1 if own else found
    prompt, _ = render_template(tokenizer, form, messages[:-1], **how, generation_prompt=True)
    if text.startswith(prompt):
        return len(prompt)
    # The prompt opens a think block that the answer lacks, say. As in TRL, the response starts where their tokens
    # part; but that must be behind the earlier turns.
    start = _first_difference(tokenizer, prompt, text, limit)
    earlier = _prefix_length(render_template(tokenizer, form, messages[:-1], **how)[0], text, tokenizer)
    return None if earlier is None or start < earlier else start


def _prefix_length(part: str, text: str, tokenizer, words: str = "") -> int | None:
    """Length of `part`, less a space and EOS token that templates may put last, if `text` begins so. Blanks that end
    its last `words` are not the template's."""
    for each in (part, part.rstrip().removesuffix(tokenizer.eos_token or "")):
        if text.startswith(each.rstrip()):
            own = words.strip() and each.endswith(words) and text.startswith(each)
            return len(each if own else each.rstrip())
    return None


def _first_difference(tokenizer, prompt: str, text: str, limit: int | None) -> int:
    """The character of `text` at which its tokens first differ from the prompt's; any behind `limit` tokens, if none
    of these does."""
    (prompt_ids, _), (ids, offsets) = tokenize(tokenizer, prompt, limit), tokenize(tokenizer, text, limit)
    n = min(len(prompt_ids), len(ids))
    differ = np.flatnonzero(prompt_ids[:n] != ids[:n])
    n = int(differ[0]) if len(differ) else n
    return int(offsets[n, 0]) if n < len(ids) else len(commonprefix((prompt, text)))  # noqa: RUF071  # texts, no paths


def _skip_opening(text: str, start: int, end: int, openings: Sequence[str]) -> int:
    """`start`, moved to the end of an opening that contains it or follows it after blanks."""
    blanks = len(text[start:end]) - len(text[start:end].lstrip())  # templates part two answers in a row so
    for opening in openings:
        found = text.find(opening, max(0, start - len(opening)), min(end, start + blanks + len(opening)))
        if found >= 0:
            return max(start, found + len(opening))
    return start


def _overlapping(offsets: np.ndarray, spans: Sequence[Span]) -> np.ndarray:
    """bool [tokens], True where a token reaches into a span, as transformers and TRL count."""
    mask = np.zeros(len(offsets), dtype=bool)
    for start, end in spans:
        mask |= (offsets[:, 0] < end) & (offsets[:, 1] > start)
    return mask
