"""The text of a row, as guards and moderation endpoints get it: all that a chat template writes."""

import json
from datetime import datetime

import numpy as np

from gradshield.data import to_conversation
from gradshield.data.encode import Example
from gradshield.scoring.ray import _blocks
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


def test_a_date_in_a_turn_reaches_a_worker_as_text():
    turns = [{"role": "user", "content": "q", "created": datetime(2026, 1, 2)}, {"role": "assistant", "content": "a"}]
    example = Example(0, np.array([1, 2]), np.array([False, True]), to_conversation({"messages": turns}, "messages"))
    (table,) = _blocks([(0, [example])])
    assert "2026-01-02" in table["said"][0].as_py()
