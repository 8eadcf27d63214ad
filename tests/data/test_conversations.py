"""One row, several trainers and several layouts: what any of them would train on is scored, or the row is set aside."""

import pytest

from gradshield.data import detect_layout, to_conversation


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


ONE, TWO = [user("q"), assistant("a")], [user("other"), assistant("another")]
TALK = [*ONE, *TWO]
SHARED = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
CALL = {"name": "find", "arguments": "{}"}


def read(record, trainer="trl"):
    return to_conversation(record, detect_layout([record]), trainer=trainer)


def trained(record, trainer="trl"):
    conversation = read(record, trainer)
    assert not isinstance(conversation, str), conversation
    return [m.content for m in conversation.messages if m.role == "assistant" and m.train]


@pytest.mark.parametrize(
    ("turn", "who"),
    [
        ({"weight": 0}, {"openai"}),
        ({"train": False}, {"axolotl"}),
        ({"training": False}, {"axolotl"}),
        ({"loss": 0}, ()),
    ],
)
def test_a_turn_s_own_flag_counts_only_for_the_trainer_that_reads_it(turn, who):
    record = {"messages": [user("q"), assistant("harm", **turn), *TWO]}
    for trainer in ("trl", "axolotl", "llamafactory", "openai"):
        assert trained(record, trainer) == (["another"] if trainer in who else ["harm", "another"])
    alone = {"messages": [user("q"), assistant("harm", **turn)]}
    assert all("is trained on" in read(alone, trainer) for trainer in who)


@pytest.mark.parametrize("label", [{"label": False}, {"kto_tag": False}, {"is_safe": False}])
def test_a_label_never_hides_an_answer(label):
    for trainer in ("trl", "axolotl", "llamafactory", "openai"):
        assert trained({"prompt": "q", "completion": "harm", **label}, trainer) == ["harm"]


def test_answers_of_a_prompt_are_trained_on_by_no_one_but_those_who_join_the_two():
    for key in ("completion", "chosen"):
        record = {"prompt": [*ONE, user("more")], key: [assistant("b")]}
        assert trained(record) == ["b"]
        assert trained(record, "axolotl") == ["a", "b"]


def test_one_turn_that_is_not_in_a_list_is_read_as_a_list_of_it():
    record = {"conversations": SHARED[1], "system": "be kind"}
    assert trained(record) == trained({"conversations": [SHARED[1]], "system": "be kind"}) == ["a"]


def test_a_system_column_beside_turns_is_read_by_those_who_do():
    for record in ({"messages": ONE}, {"prompt": ONE[:1], "completion": ONE[1:]}):
        for trainer, roles in (("trl", 2), ("openai", 2), ("axolotl", 3), ("llamafactory", 3)):
            if trainer == "openai" and "messages" not in record:
                continue
            assert len(read({**record, "system": "linux"}, trainer).messages) == roles
    mapped = to_conversation({"log": ONE, "s": "be kind"}, "mapped", {"messages": "log", "system": "s"})
    assert [m.role for m in mapped.messages] == ["system", "user", "assistant"]


def test_the_answer_chosen_after_turns_is_the_response_and_their_own_answers_are_scored_too():
    record = {"messages": [*ONE, user("harm?")], "chosen": assistant("harm"), "rejected": assistant("no")}
    assert trained(record) == ["a", "harm"]
    ended = {"messages": ONE, "chosen": assistant("unused"), "rejected": assistant("no")}
    assert "ends with an answer, and chosen has a different one" in read(ended)
    assert trained({"messages": ONE, "chosen": assistant("a"), "rejected": assistant("no")}) == ["a"]


@pytest.mark.parametrize(
    "other",
    [
        {"messages": TWO},
        {"prompt": TWO[:1], "completion": TWO[1:]},
        {"prompt": "other", "completion": "another"},
        {"conversations": [{"from": "human", "value": "other"}, {"from": "gpt", "value": "another"}]},
        {"conversations": TWO},
        {"instruction": "other", "output": "another"},
        {"input_ids": [1, 2], "labels": [1, 2]},
        {"labels": [1, 2]},
        {"chosen": TWO, "rejected": ONE},
        {"images": ["a.jpg"]},
        {"image": {"bytes": "x"}},
        {"conversations": [{"from": "narrator", "value": "x"}]},
    ],
)
def test_a_second_layout_that_says_something_else_sets_the_row_aside(other):
    for first in ({"messages": ONE}, {"prompt": ONE[:1], "completion": ONE[1:]}, {"conversations": SHARED}):
        if not set(first) & set(other):
            reason = read({**first, **other})
            assert isinstance(reason, str) and (" beside " in reason or "unknown role" in reason), (first, other)


@pytest.mark.parametrize(
    "other",
    [
        {"prompt": ONE[:1], "completion": ONE[1:]},
        {"prompt": "q", "completion": "a"},
        {"conversations": SHARED},
        {"instruction": "q", "input": "", "output": "a"},
        {"chosen": ONE, "rejected": TWO},
        {"prompt": "q", "chosen": "a", "rejected": "no"},
        {"prompt": None, "completion": None, "images": []},
        {"text": "notes on this row"},  # nobody reads it beside turns
        {"prompt_id": "x", "prompt": "q"},
    ],
)
def test_a_second_layout_that_says_the_same_is_scored(other):
    assert trained({"messages": ONE, **other}) == ["a"]


THOUGHT = assistant("a", reasoning_content="harm")
FROM = [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]
HIDDEN = {
    "reasoning": {"messages": ONE, "prompt": ONE[:1], "completion": [THOUGHT]},
    "reasoning in from/value": {"messages": ONE, "conversations": [FROM[0], {**FROM[1], "reasoning_content": "harm"}]},
    "another call": {
        "messages": [user("q"), assistant("a", tool_calls=[{"type": "function", "function": CALL}])],
        "prompt": ONE[:1],
        "completion": [assistant("a", tool_calls=[{"type": "function", "function": {**CALL, "name": "harm"}}])],
    },
    "beside texts": {"instruction": "q", "output": "a", "prompt": ONE[:1], "completion": [THOUGHT]},
    "markers": {"messages": ONE, "prompt": ONE[:1], "completion": [assistant("a\n<|mix_it|>\n<|light_it|>")]},
    "frames": {"messages": ONE, "prompt": ONE[:1], "completion": [assistant("System: output! a")]},
    "a rendered text": {"question": "q", "answer": "a", "text": "q\n<|mix_it|>\na"},
    "pictures": {"question": "q", "answer": "a", "text": "q\n💣🔪\na"},
    "a system turn": {"messages": ONE, "conversations": [{"from": "system", "value": "obey"}, *FROM]},
    "padding": {"messages": [user("q" + "\n..." * 70), assistant("a")], "prompt": ONE[:1], "completion": ONE[1:]},
    "a text beside turns that TRL does not find": {"conversations": ONE, "text": "harm"},
    "a text beside a preference": {"question": "q", "chosen": "a", "rejected": "b", "text": "harm"},
    "a blank prompt": {"messages": ONE, "prompt": "", "completion": "harm"},
    "a blank completion": {"conversations": FROM, "prompt": "harm", "completion": ""},
}


@pytest.mark.parametrize("row", HIDDEN.values(), ids=HIDDEN)
def test_what_trl_reads_beside_the_scored_layout_is_the_same_to_the_letter(row):
    assert isinstance(read(row), str) and " beside " in read(row)


def test_a_history_beside_turns_is_read_by_those_who_do():
    row = {"prompt": ONE[:1], "completion": ONE[1:], "history": [["x " * 480, ""]]}
    assert [m.content for m in read(row).messages] == ["q", "a"]
    assert len(read(row, "llamafactory").messages) == 4
    texts = {"instruction": "q", "output": "a", "history": [["before", "b"]]}
    assert [m.content for m in read(texts).messages] == ["before", "b", "q", "a"]


@pytest.mark.parametrize(("name", "values"), [("input_ids", ([], None, "a")), ("labels", ([], None, "a", 0, 1))])
def test_a_column_whose_presence_stops_trl_sets_the_row_aside_for_trl(name, values):
    for value in values:
        for row in ({"messages": ONE}, {"prompt": ONE[:1], "completion": ONE[1:]}, {"text": "a"}):
            assert f"column {name}: TRL takes it for" in read({**row, name: value})
            assert not isinstance(read({**row, name: value}, "axolotl"), str)


def test_a_row_at_which_trl_stops_is_set_aside_for_trl():
    for row, why in (
        ({"messages": ONE, "conversations": []}, "conversations is an empty list"),
        ({"messages": ONE, "completion": []}, "completion is an empty list"),
        ({"messages": ONE[:1], "chosen": "c", "completion": []}, "completion is an empty list"),
        ({"messages": ONE, "tools": ""}, "tools is an empty text"),
        ({"prompt": "q", "completion": "a", "tools": ""}, "tools is an empty text"),
        ({"text": "a", "tools": ""}, "tools is an empty text"),
        ({"text": "a", "chat_template_kwargs": None}, "chat_template_kwargs is empty"),
        ({"messages": ONE, "chat_template_kwargs": '{"a": 1}'}, "chat_template_kwargs is a text"),
        ({"text": "a", "chat_template_kwargs": "{}"}, "chat_template_kwargs is a text"),
        *(({"prompt": ONE[:1], "completion": a}, "not both lists of turns") for a in ("a", 1, True, ONE[1])),
        ({"prompt": "q", "completion": ONE[1:]}, "not both lists of turns"),
    ):
        assert why in read(row), row
        assert not isinstance(read(row, "axolotl"), str), row


def test_a_pair_with_two_answers_or_another_text_is_set_aside():
    pair = {"instruction": "q", "output": "a"}
    for more in ({"answer": "b"}, {"response": "b"}, {"prompt": "r"}, {"text": "q harm"}):
        assert " beside " in read({**pair, **more}), more
    framed = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nq\n\n### Response:\na"
    )
    for same in (
        {"answer": "a"},
        {"text": framed},
        {"text": "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na"},
    ):
        assert trained({**pair, **same}) == ["a"]


def test_an_answer_that_is_part_of_another_is_another():
    assert " beside " in read({"prompt": "q", "completion": "I can't.\n\nSure, here is", "response": "Sure, here is"})


def test_a_row_of_a_concatenated_set_is_read_by_its_own_layout():
    rows = [
        {"messages": ONE, "prompt": None, "completion": None},
        {"messages": None, "prompt": ONE[:1], "completion": ONE[1:]},
    ]
    assert detect_layout([rows[0]]) == "messages"
    for row in rows:
        assert [m.content for m in to_conversation(row, "messages").messages] == ["q", "a"]


@pytest.mark.parametrize(("more", "what"), [({"value": "b"}, "content and value"), ({"from": "user"}, "role and from")])
def test_a_turn_that_says_two_things_sets_the_row_aside(more, what):
    assert f"has both {what}" in read({"messages": [user("q"), assistant("a", **more)]})
    assert trained({"messages": [user("q"), assistant("a", value="a")]}) == ["a"]


def test_a_turn_whose_role_or_text_trl_does_not_read_sets_the_row_aside_for_trl():
    for talk, why in (
        ([user("q"), SHARED[1], *TWO], "turn 2 has no role"),
        ([SHARED[0], assistant("a")], "turn 1 has no role"),
        ([user("q"), {"role": "assistant", "value": "a"}, *TWO], "turn 2 has its text under value"),
        ([{"role": "user", "content": None, "value": "q"}, assistant("a")], "turn 1 has its text under value"),
    ):
        assert why in read({"messages": talk}) and why in read({"prompt": talk[:1], "completion": talk})
        assert trained({"messages": talk}, "axolotl")[0] == "a"


@pytest.mark.parametrize(
    ("first", "column", "same", "other"),
    [
        ({"conversations": SHARED}, "conversation", SHARED, [SHARED[0], {"from": "gpt", "value": "harm"}]),
        (
            {"transcript": "Human: q\n\nAssistant: a"},
            "chosen",
            "\n\nHuman: q\n\nAssistant: a",
            "Human: q\n\nAssistant: harm",
        ),
        ({"messages": ONE[:1], "chosen": "a"}, "prompt", "q", "harm?"),
        ({"messages": ONE[:1], "chosen": "a"}, "prompt", ONE[:1], TWO[:1]),
        ({"instruction": "q", "input": "x", "chosen": "a"}, "prompt", "q\nx", "harm?"),
    ],
)
def test_a_second_column_of_the_same_layout_that_says_something_else_sets_the_row_aside(first, column, same, other):
    for filled in ({}, {column: None}, {column: same}):
        assert trained({**first, **filled}) == ["a"]
    assert " beside " in read({**first, column: other})


def test_openai_s_functions_are_tools_for_openai_and_set_aside_for_the_others():
    record = {"messages": [user("q"), assistant(None, function_call=CALL), *TWO], "functions": [{"name": "find"}]}
    found = read(record, "openai")
    assert found.tools == [{"type": "function", "function": {"name": "find"}}]
    assert found.messages[1].extra == {"tool_calls": [{"type": "function", "function": CALL}]}
    for trainer in ("trl", "axolotl", "llamafactory"):
        assert "has a function_call" in read(record, trainer)


def test_a_role_that_trl_does_not_know_sets_the_row_aside_for_trl():
    record = {"messages": [{"role": "human", "content": "q"}, {"role": "gpt", "content": "a"}]}
    assert "has the role 'human'" in read(record)
    assert trained(record, "axolotl") == ["a"]
    assert read({"messages": [{"role": "developer", "content": "s"}, *ONE]}).messages[0].role == "developer"


def test_blank_turns_before_an_answer_change_nothing_else():
    record = {"messages": [user("q"), assistant(""), user(""), assistant("a")]}
    assert trained(record) == ["", "a"]
    assert read({"messages": [user("q"), assistant(" \n")]}) == "empty response"
