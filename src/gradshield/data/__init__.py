"""The data room: files → rows → conversations → files. `gradshield.data.encode` does the encoding."""

from gradshield.data.conversations import to_conversation
from gradshield.data.formats import Conversation, Message, detect_layout
from gradshield.data.rows import Row, Source, open_source, read_rows
from gradshield.data.write import write_outputs

__all__ = [
    "Conversation",
    "Message",
    "Row",
    "Source",
    "detect_layout",
    "open_source",
    "read_rows",
    "to_conversation",
    "write_outputs",
]
