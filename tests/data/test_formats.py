"""Layouts: what a model would be trained on, and never a label or a rejected answer."""

import json

import pytest

from gradshield.base.errors import UserError
from gradshield.data import Message, detect_layout, to_conversation

Q, A = Message("user", "q"), Message("assistant", "a")
MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
NAN = float("nan")
HH = "\n\nHuman: q\n\nAssistant: a"


def turns(record, layout=None, columns=None, trainer="trl"):
    conversation = to_conversation(record, layout or detect_layout([record]), columns, trainer)
    return conversation if isinstance(conversation, str) else list(conversation.messages)


@pytest.mark.parametrize(
    ("record", "layout"),
    [
        ({"messages": MESSAGES, "prompt": "x"}, "messages"),
        ({"messages": '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]'}, "messages"),
        ({"prompt": "q", "completion": "a"}, "prompt_completion"),
        ({"prompt": "q", "response": "a", "label": "no"}, "prompt_completion"),
        ({"question": "q", "answer": "a"}, "prompt_completion"),
        ({"input": "q", "output": "a"}, "prompt_completion"),
        ({"query": "q", "response": "a"}, "prompt_completion"),
        ({"instruction": "q", "context": "", "response": "a", "category": "no"}, "prompt_completion"),
        ({"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}, "prompt_completion"),
        ({"instruction": "q", "input": "", "output": "a", "text": "### Instruction:\nq\n\n### Response:\na"}, "alpaca"),
        ({"conversations": SHAREGPT, "id": 3}, "sharegpt"),
        ({"conversation": MESSAGES}, "sharegpt"),
        ({"prompt": "q", "chosen": "a", "rejected": "no"}, "preference"),
        ({"prompt": "q", "rejected": "no", "chosen": "a"}, "preference"),
        ({"prompt": "q", "chosen": MESSAGES, "rejected": []}, "preference"),
        ({"prompt": "q", "chosen": MESSAGES[1:], "rejected": []}, "preference"),
        ({"prompt": MESSAGES[:1], "chosen": MESSAGES[1:], "rejected": []}, "preference"),
        ({"chosen": MESSAGES, "rejected": []}, "preference"),
        ({"conversations": SHAREGPT[:1], "chosen": SHAREGPT[1], "rejected": SHAREGPT[1]}, "preference"),
        ({"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": " a", "rejected": " no"}, "preference"),
        ({"prompt": "\n\nHuman: q", "chosen": "\n\nAssistant: a", "rejected": "no"}, "preference"),
        ({"prompt": "Human: q", "chosen": "Assistant: a", "rejected": "no"}, "preference"),
        ({"prompt": "\n\nHuman: q", "chosen": HH, "rejected": "no"}, "preference"),
        ({"chosen": HH, "rejected": "\n\nHuman: q\n\nAssistant: no"}, "transcript"),
        ({"transcript": HH.lstrip(), "rating": 4}, "transcript"),
        ({"transcript": HH.replace("\n", "\r\n")}, "transcript"),
        ({"prompt": "q", "response": "a", "category": {"crime": True}, "is_safe": False}, "beavertails"),
        ({"prompt": "q", "response": "a", "is_safe": False, "completion": "a"}, "beavertails"),
        ({"instruction": "q", "output": "a", "answer": "a", "prompt": "q"}, "alpaca"),
        ({"instruction": None, "input": "q", "output": "a"}, "alpaca"),
    ],
)
def test_each_layout_gives_the_same_conversation(record, layout):
    assert detect_layout([record]) == layout
    assert turns(record) == [Q, A]


def test_text_rows_have_no_turns():
    conversation = to_conversation({"text": " a b\n", "label": 1}, detect_layout([{"text": "a"}]))
    assert conversation.text == " a b\n" and conversation.messages == ()
    assert to_conversation({"text": " \n"}, "text") == "empty text"


def test_layout_is_the_one_of_most_records():
    pair, text = {"prompt": "q", "response": "a"}, {"text": "t"}
    assert detect_layout([pair, pair, text]) == "prompt_completion"
    assert detect_layout([pair, text, text]) == "text"
    assert detect_layout([text, {"x": 1}, {"y": 1}]) is None
    assert detect_layout([]) is None


def test_alpaca_joins_as_llama_factory_does():
    record = {"instruction": "do", "input": "this", "output": "a", "system": "s", "history": [["q1", "a1"]]}
    roles = ["system", "user", "assistant", "user", "assistant"]
    assert [(m.role, m.content) for m in turns(record)] == list(zip(roles, ["s", "q1", "a1", "do\nthis", "a"]))
    assert turns({"instruction": "do", "context": "this", "response": "a"})[0].content == "do\nthis"
    assert turns({"instruction": "do", "input": "this", "chosen": "a"})[0].content == "do\nthis"
    assert "history" in turns(record | {"history": [["q1"]]})


@pytest.mark.parametrize(
    ("history", "read"),
    [(None, []), (NAN, []), ("", []), ("[]", []), ("null", []), ([], []), ('[["q", "a"]]', [Q, A])],
)
def test_history_may_be_missing_or_json_text(history, read):
    assert turns({"instruction": "q", "output": "a", "history": history}) == [*read, Q, A]


@pytest.mark.parametrize("history", [5, "q", {"q": "a"}, ["qa"], [["q"]]])
def test_history_of_another_form_sets_the_row_aside(history):
    assert "history is not a list" in turns({"instruction": "q", "output": "a", "history": history})


CALL = {"type": "function", "function": {"name": "f", "arguments": "{}"}}


def test_openai_weights_tools_and_calls():
    messages = [
        {"role": "developer", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "text", "text": "q2", "image_url": None}]},
        {"role": "assistant", "content": "old", "weight": 0},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "name": None},
        {"role": "tool", "content": "4", "name": "f"},
        {"role": "assistant", "content": "a", "weight": 1, "reasoning_content": "r", "tool_calls": []},
    ]
    tools = [{"type": "function"}]
    for trainer in ("trl", "openai"):
        conversation = to_conversation({"messages": messages, "tools": tools}, "messages", trainer=trainer)
        assert conversation.tools == tools
        assert list(conversation.messages) == [
            Message("developer", "s"),
            Message("user", "qq2"),
            Message("assistant", "old", train=trainer == "trl"),
            Message("assistant", "", extra={"tool_calls": [CALL]}),
            Message("tool", "4", extra={"name": "f"}),
            Message("assistant", "a", extra={"reasoning_content": "r"}),
        ]
    as_text = {"messages": messages, "tools": '[{"type": "function"}]'}
    assert to_conversation(as_text, "messages", trainer="openai") == conversation
    assert to_conversation({"messages": MESSAGES, "tools": NAN}, "messages").tools is None
    for none in ([], "[]"):  # TRL parses a text, and a template can tell no tools from an empty list
        assert to_conversation({"messages": MESSAGES, "tools": none}, "messages").tools == []


@pytest.mark.parametrize("calls", [[CALL], [CALL["function"]]])
def test_tool_calls_that_name_their_functions_are_read(calls):
    record = {"messages": [MESSAGES[0], {"role": "assistant", "content": None, "tool_calls": calls}]}
    for read in (turns(record), turns({"messages": json.dumps(record["messages"])})):
        assert read[1].content == "" and read[1].extra["tool_calls"] == calls


@pytest.mark.parametrize("calls", [[], {}, "", NAN, None])
def test_empty_tool_calls_are_none(calls):
    for key in ("tool_calls", "function_call"):
        assert turns({"messages": [MESSAGES[0], {**MESSAGES[1], key: calls}]}) == [Q, A]
        no_content = {"role": "assistant", "content": None, key: calls}
        assert turns({"messages": [MESSAGES[0], no_content]}) == "turn 2 (assistant) is missing"
    assert turns({"conversations": [SHAREGPT[0], {"from": "function_call", "value": "[]"}]}) == "empty response"


@pytest.mark.parametrize("calls", [["x"], [None], [{"type": "function"}], [{"function": {"name": ""}}], [CALL, {}], 3])
def test_tool_calls_that_name_no_function_set_the_row_aside(calls):
    for content in (None, "a"):
        turn = {"role": "assistant", "content": content, "tool_calls": calls}
        assert turns({"messages": [MESSAGES[0], turn]}) == "turn 2 (assistant) has tool calls that name no function"
        turn["tool_calls"] = json.dumps(calls)
        assert "has tool calls as text" in turns({"messages": [MESSAGES[0], turn]})


@pytest.mark.parametrize(("text", "problem"), [("\ud800", r"lone surrogate \ud800"), ("\0", "NUL character")])
def test_what_no_tokenizer_can_read_inside_json_text_sets_the_row_aside(text, problem):
    bad = json.dumps([{**MESSAGES[0], "content": text}, MESSAGES[1]])
    assert problem in turns({"messages": bad})
    assert problem in turns({"messages": MESSAGES, "tools": json.dumps([{"name": text}])})
    assert problem in turns({"instruction": "q", "output": "a", "history": json.dumps([[text, "a"]])})


def test_sharegpt_function_calls_are_tool_calls():
    call = {"from": "function_call", "value": '{"name": "f", "arguments": {}}'}
    record = {"conversations": [SHAREGPT[0], call, {"from": "observation", "value": "4"}, SHAREGPT[1]], "system": "s"}
    system, user, called, tool, answer = turns(record)
    assert called.extra == {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
    assert (system.content, user, called.content, tool.role, answer) == ("s", Q, "", "tool", A)


def test_a_system_column_does_not_double_a_system_turn():
    record = {"messages": [{"role": "system", "content": "s"}, *MESSAGES], "system": "other"}
    assert turns(record) == [Message("system", "s"), Q, A]


def test_a_user_turn_after_the_last_answer_stays():
    assert turns({"messages": [*MESSAGES, MESSAGES[0]]}) == [Q, A, Q]


def test_numbers_and_booleans_are_read_as_their_text():
    assert turns({"prompt": 1.5, "response": 3})[1] == Message("assistant", "3")
    assert turns({"prompt": True, "response": "a"})[0] == Message("user", "True")


@pytest.mark.parametrize(
    ("record", "layout", "reason"),
    [
        ({"prompt": "q", "response": " \n"}, "prompt_completion", "empty response"),
        ({"prompt": "q", "response": None}, "prompt_completion", "response is missing"),
        ({"prompt": "q", "response": float("nan")}, "prompt_completion", "response is missing"),
        ({"prompt": "q", "response": {"a": 1}}, "prompt_completion", "has no role"),
        ({"prompt": "q", "response": [1]}, "prompt_completion", "turn 1 is not an object"),
        ({"prompt": "q", "other": "a"}, "prompt_completion", "no column completion or response"),
        ({}, "alpaca", "no column instruction or input"),
        ({}, "preference", "no column chosen"),
        ({}, "transcript", "no column transcript"),
        ({}, "text", "no column text or content"),
        ({}, "sharegpt", "no column conversations or conversation"),
        ({"messages": []}, "messages", "messages is empty"),
        ({"messages": None}, "messages", "messages is missing"),
        ({"messages": "[{'role': 'user'}]"}, "messages", "messages is not a list of turns"),
        ({"messages": MESSAGES[:1]}, "messages", "no assistant turn"),
        ({"messages": MESSAGES[1:]}, "messages", "no user or system turn"),
        (
            {"messages": [MESSAGES[0], {"role": "assistant", "content": None}]},
            "messages",
            "turn 2 (assistant) is missing",
        ),
        ({"messages": [{"role": "alien", "content": "q"}]}, "messages", "turn 1 has the unknown role 'alien'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages",
            "part of type 'image_url'",
        ),
        ({"conversations": [{"from": "narrator", "value": "q"}]}, "sharegpt", "unknown role 'narrator'"),
        ({"transcript": "no turns"}, "transcript", "not a transcript"),
        ({"transcript": "preface" + HH}, "transcript", "not a transcript"),
        ({"messages": MESSAGES, "tools": "f()"}, "messages", "tools is not a list"),
        ({"messages": MESSAGES, "tools": 0}, "messages", "tools is not a list"),
        ({"messages": MESSAGES, "tools": {}}, "messages", "tools is not a list"),
    ],
)
def test_what_can_not_be_trained_on_is_set_aside_with_its_reason(record, layout, reason):
    assert reason in turns(record, layout)


def test_a_system_turn_stands_in_for_a_user_turn():
    assert turns({"messages": [{"role": "system", "content": "s"}, MESSAGES[1]]}) == [Message("system", "s"), A]


def test_columns_map_any_table():
    columns = {"prompt": "dialogue", "response": "summary", "system": "task"}
    record = {"dialogue": "q", "summary": "a", "task": "s", "text": "no"}
    assert detect_layout([record], columns) == "mapped"
    assert turns(record, "mapped", columns) == [Message("system", "s"), Q, A]
    assert turns({"log": MESSAGES, "tools": []}, "mapped", {"messages": "log"}) == [Q, A]
    assert to_conversation({"body": "t"}, "mapped", {"text": "body"}).text == "t"
    assert turns({"dialogue": "q"}, "mapped", columns) == "no column 'summary' (there are: dialogue)"
    assert turns({"dialogue": "q", "summary": "a"}, "mapped", columns) == [Q, A]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": "dialog", "response": "b"}, "--map prompt=dialog: no such column; the file has a, b"),
        ({"answer": "b"}, "'answer' is not one of"),
        ({"prompt": "a"}, "both prompt and response"),
    ],
)
def test_a_mapping_that_can_not_work_is_refused_at_once(columns, message):
    with pytest.raises(UserError, match=message):
        detect_layout([{"a": 1}, {"b": 2}], columns)
