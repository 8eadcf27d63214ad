"""The text of a row, for scorers that read text."""

import json

from gradshield.data.encode import Example
from gradshield.data.turns import Message

_WRITTEN = ("reasoning_content", "reasoning", "thinking", "thoughts", "tool_calls")  # keys that chat templates read


def exchanges(example: Example) -> list[tuple[str, str]]:
    """(request, answer) of each assistant turn that is trained on: the answer and the user's words before it."""
    found, asked = [], ""
    for message in _conversation(example).messages:
        if message.role == "user":
            asked = message.content
        elif message.role == "assistant" and message.train:
            found.append((asked, _said(message)))
    return found


def whole_text(example: Example) -> str:
    """All that the row says: its plain text, or its turns with a blank line between them."""
    conversation = _conversation(example)
    return conversation.text or "\n\n".join(map(_said, conversation.messages))


def _said(message: Message) -> str:
    """A turn's text, with what else templates write of it: its reasoning, its tool calls."""
    more = [value for name, value in (message.extra or {}).items() if name in _WRITTEN]
    said = [each if isinstance(each, str) else json.dumps(each, ensure_ascii=False, default=str) for each in more]
    return "\n".join([*said, message.content])


def _conversation(example: Example):
    if example.conversation is None:
        raise TypeError('a scorer of text declares "text" in its needs')
    return example.conversation
