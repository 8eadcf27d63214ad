"""The text of a row, for scorers that read text."""

from gradshield.data.encode import Example


def exchanges(example: Example) -> list[tuple[str, str]]:
    """(request, answer) of each assistant turn that is trained on: the answer and the user's words before it."""
    found, asked = [], ""
    for message in _conversation(example).messages:
        if message.role == "user":
            asked = message.content
        elif message.role == "assistant" and message.train:
            found.append((asked, message.content))
    return found


def whole_text(example: Example) -> str:
    """All that the row says: its plain text, or its turns with a blank line between them."""
    conversation = _conversation(example)
    return conversation.text or "\n\n".join(message.content for message in conversation.messages)


def _conversation(example: Example):
    if example.conversation is None:
        raise TypeError('a scorer of text declares "text" in its needs')
    return example.conversation
