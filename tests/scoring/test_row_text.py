"""The text of a row, as guards and moderation endpoints get it: all that a chat template writes."""

import json

from gradshield.data import to_conversation
from gradshield.data.encode import Example
from gradshield.scoring.row_text import exchanges, whole_text


def test_reasoning_and_tool_calls_are_part_of_an_answer():
    call = {"type": "function", "function": {"name": "find", "arguments": {"what": "härm"}}}
    answers = [{"content": "a", "reasoning_content": "thought"}, {"content": "", "tool_calls": [call]}]
    turns = [each for answer in answers for each in ({"role": "user", "content": "q"}, {"role": "assistant", **answer})]
    turns[0] |= {"name": "Ann"}  # no template writes it
    example = Example(0, None, None, to_conversation({"messages": turns}, "messages"))
    written = json.dumps([call], ensure_ascii=False) + "\n"
    assert exchanges(example) == [("q", "thought\na"), ("q", written)]
    assert whole_text(example) == f"q\n\nthought\na\n\nq\n\n{written}"
