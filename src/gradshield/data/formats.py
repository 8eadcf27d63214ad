r"""Record → conversation, for the layouts that public fine-tuning data come in.

A record's layout is detected from its columns. Where several fit, the first of this table wins:

| layout            | columns                              | becomes                                        |
|-------------------|--------------------------------------|------------------------------------------------|
| preference        | chosen, with messages, conversations | the prompt and the chosen answer, never the    |
|                   | or one of `PROMPTS`, or as turns    | rejected one                                   |
| messages          | messages                             | its turns                                      |
| sharegpt          | conversations or conversation        | its turns (from/value or role/content)         |
| beavertails       | prompt, response, is_safe            | prompt and response; the rest are labels       |
| alpaca            | instruction, output                  | (history and) instruction + "\n" + input, as   |
|                   | (input, system, history)             | LLaMA-Factory joins them, and output           |
| prompt_completion | one of `PROMPTS` and                | both, either of them a text or a list of turns |
|                   | one of `RESPONSES`                  | (TRL); an instruction takes `input`, `context` |
| transcript        | transcript, or chosen in the form    | its turns, outer blanks stripped               |
|                   | "\n\nHuman: ...\n\nAssistant: ..."   |                                                |
| text              | text or content                      | plain text; other columns are ignored          |
| mapped            | as `columns` says                    | messages, text, or (system,) prompt, response  |

A row of another layout than its file's, as in concatenated sets, is read by its own. A row that two layouts read
differently is set aside, since trainers differ in which they read; `conversations.py` decides both.

Every layout but text takes `tools` and `chat_template_kwargs`. A `system` or `system_prompt` column goes with texts,
and with lists of turns where the trainer reads it. Numbers and booleans where text should be are read as `str` gives
them ("3", "True"), as from a CSV file, but for the layout text, where TRL fails on them; null and NaN are missing.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from gradshield.base.errors import UserError
from gradshield.data.trainers import Rules
from gradshield.data.turns import ROLE_OF, Message, SetAside, is_missing, parse_cell, parse_turns, text

PROMPTS = ("prompt", "instruction", "question", "query", "input")
RESPONSES = ("completion", "response", "answer", "output")
_SYSTEM = ("system", "system_prompt")
VARIABLES = "chat_template_kwargs"
_TARGETS = ("messages", "text", "prompt", "response", "system")  # what --columns can name
_TURN = re.compile(r"(?:\A\s*|(?:\r?\n){2})(Human|Assistant):")  # the HH and red-team transcripts
_RESERVED = {  # what apply_chat_template takes besides a template's variables: a row would change more than its text
    *("conversation", "messages", "tools", "chat_template", "add_generation_prompt", "continue_final_message"),
    *("tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs"),
    *("processing_class", "input"),  # and what TRL and transformers pass themselves, so that a row that names it fails
    *("self", "conversations", "compiled_template"),
}


@dataclass(frozen=True)
class Conversation:
    """The training data of one row: turns, or plain text."""

    messages: tuple[Message, ...]  # empty when `text` is used
    text: str | None = None  # the loss is on every token
    tools: list | None = None
    variables: dict | None = None  # what else the row tells its chat template (TRL's `chat_template_kwargs`)
    unlike_trl: str | None = None  # why TRL renders it otherwise, which matters where the loss is on every token


class NoAnswer(SetAside):
    """There is no assistant turn, so no trainer trains on these turns."""


def detect_layout(records: Sequence[dict], columns: dict[str, str] | None = None) -> str | None:
    """The layout that fits most of the first records, if it fits half of them or more; else None.

    With `columns` it is "mapped"; UserError for a target not in `_TARGETS` or a column that no record has.
    """
    if columns:
        _check_columns(records, columns)
        return "mapped"
    if not records:
        return None
    fitting = {layout: sum(map(fits, records)) for layout, (fits, _) in LAYOUTS.items()}
    best = max(fitting, key=lambda layout: fitting[layout])  # the first of the table among equals
    return best if fitting[best] * 2 >= len(records) else None


def read_layout(record: dict, layout: str, rules: Rules) -> Conversation:
    """The record read in one layout, whatever else it contains. Raises SetAside."""
    if layout == "text":
        if rules.verbatim:  # TRL parses these whatever the layout
            _tools(record, rules)
            _variables(record, rules)
        return _text_row(record, rules)
    messages = LAYOUTS[layout][1](record, rules)
    unlike_trl = _unlike_trl(record, messages) if rules.verbatim and layout == "sharegpt" else None
    if rules.system or not (layout == "messages" or any(message.raw for message in messages)):
        messages = _with_system(record, messages)
    conversation = checked_conversation(messages, _tools(record, rules))
    return replace(conversation, variables=_variables(record, rules), unlike_trl=unlike_trl)


def checked_conversation(messages: list[Message], tools: list | None) -> Conversation:
    """The conversation, if it contains a request and something to train on."""
    answers = [message for message in messages if message.role == "assistant"]
    if not answers:
        raise NoAnswer("no assistant turn")
    if not any(message.role in ("user", "system", "developer") for message in messages):
        raise SetAside("no user or system turn")
    trained = [message for message in answers if message.train]
    if not trained:
        raise SetAside("no assistant turn is trained on: each is excluded from the loss, or part of the prompt")
    if not any(message.content.strip() or "tool_calls" in (message.extra or {}) for message in trained):
        raise SetAside("empty response")
    return Conversation(tuple(messages), tools=tools)


def from_pair(
    record: dict, rules: Rules, prompts: Sequence[str] = PROMPTS, responses: Sequence[str] = RESPONSES
) -> list[Message]:
    before = []
    key, response = _pick(record, prompts), _pick(record, responses)
    ignored = rules.verbatim and isinstance(record[key], list)  # as TRL does; beside texts it is LLaMA-Factory's
    for turn in [] if ignored else _list(record, "history"):
        if not isinstance(turn, list | tuple) or len(turn) != 2:
            raise SetAside("history is not a list of [prompt, response] pairs")
        before += [
            Message("user", text(turn[0], "history")),
            Message("assistant", text(turn[1], "history")),
        ]
    prompt = parse_turns(_asked(record, key), "user", key, rules)
    return before + _as_prompt(prompt, rules) + parse_turns(record[response], "assistant", response, rules)


def _as_prompt(messages: list[Message], rules: Rules) -> list[Message]:
    if rules.prompt:
        return messages
    # TRL also renders the turns of a prompt alone. Of a plain text we make the turns ourselves.
    return [replace(each, train=each.role != "assistant", prompt=each.raw is not None) for each in messages]


def _asked(record: dict, key: str) -> Any:
    """The prompt; for an instruction, with its input or context."""
    more = _first(record, ("input", "context")) if key == "instruction" else None
    if more is None or is_missing(record[more]) or is_missing(record[key]):
        return record[key]
    return "\n".join(filter(None, (text(record[key], key), text(record[more], more))))


def _from_messages(record: dict, rules: Rules, keys: Sequence[str]) -> list[Message]:
    key = _pick(record, keys)
    return parse_turns(parse_cell(record[key]), None, key, rules)


def _from_chosen(record: dict, rules: Rules) -> list[Message]:
    chosen = record[_pick(record, ("chosen",))]
    opening = _TURN.match(chosen) if isinstance(chosen, str) else None
    if opening and opening[1] == "Human":
        return _transcript(chosen)
    key = _first(record, ("messages", "conversations", *PROMPTS))
    asked = None if key is None else _asked(record, key)
    if isinstance(chosen, str) and isinstance(asked, str) and _TURN.match(asked):
        return _transcript(asked + ("\n\n" if opening else "") + chosen)  # "Assistant:" ends the one or opens the other
    if opening:
        return _transcript(chosen)
    if key is None:
        return parse_turns(chosen, None, "chosen", rules)
    answer = parse_turns(chosen, "assistant", "chosen", rules)
    if answer[0].role in ("user", "system", "developer"):
        return answer  # the whole conversation, prompt and all
    if key in PROMPTS:
        return _as_prompt(parse_turns(asked, "user", key, rules), rules) + answer
    # Supervised fine-tuning reads these columns by themselves, so their own answers are trained on, too.
    prompt = parse_turns(parse_cell(asked), None, key, rules)
    if prompt[-1].role != "assistant":
        return prompt + answer
    if [message.content.strip() for message in answer] != [prompt[-1].content.strip()]:
        raise SetAside(f"{key} ends with an answer, and chosen has a different one; drop one of them")
    return prompt


def _from_transcript(record: dict, rules: Rules) -> list[Message]:
    return _transcript(text(record[_pick(record, ("transcript", "chosen"))], "transcript"))


def _text_row(record: dict, rules: Rules) -> Conversation:
    key = _pick(record, ("text", "content"))
    body = text(record[key], key)
    if rules.verbatim and body != record[key]:
        raise SetAside(f"{key} is a number, on which TRL fails; make it a text")
    if not body.strip():
        raise SetAside("empty text")
    return Conversation((), text=body)


def _transcript(body: str) -> list[Message]:
    start, *rest = _TURN.split(body)
    if not rest or start.strip():
        raise SetAside('not a transcript of "Human:" and "Assistant:" turns')
    roles, contents = rest[::2], rest[1::2]
    return [Message(ROLE_OF[role.lower()], said.strip()) for role, said in zip(roles, contents, strict=True)]


def _list(record: dict, column: str) -> list:
    """The list in a column, which may be JSON text; empty if there is none."""
    value = parse_cell(record.get(column))
    if is_missing(value) or value == "":
        return []
    if not isinstance(value, list):
        raise SetAside(f"{column} is not a list")
    return value


def _tools(record: dict, rules: Rules) -> list | None:
    """The tools that the template is given: an empty list is one, too, since templates tell it from none."""
    if rules.verbatim and record.get("tools") == "":
        raise SetAside("tools is an empty text, on which TRL fails; drop it from this row")
    if rules.functions and (functions := _list(record, "functions")):
        return [{"type": "function", "function": function} for function in functions]
    return _list(record, "tools") or ([] if parse_cell(record.get("tools")) == [] else None)


def _variables(record: dict, rules: Rules) -> dict | None:
    value = parse_cell(record.get(VARIABLES))
    if is_missing(value) or value == "":
        if rules.verbatim and VARIABLES in record:
            raise SetAside(f"{VARIABLES} is empty, on which TRL fails; drop it from this row")
        return None
    if not isinstance(value, dict):
        raise SetAside(f"{VARIABLES} is not an object")
    if rules.verbatim and isinstance(record[VARIABLES], str):
        raise SetAside(f"{VARIABLES} is a text, on which TRL fails; make it an object")
    if reserved := sorted(_RESERVED & set(value)):
        raise SetAside(f"{VARIABLES} names {reserved[0]}, which is not a variable for chat templates; drop it")
    return value


def _with_system(record: dict, messages: list[Message]) -> list[Message]:
    key = _first(record, _SYSTEM)
    if key is None or not record[key] or is_missing(record[key]) or messages[0].role == "system":
        return messages
    return [Message("system", text(record[key], key)), *messages]


def _unlike_trl(record: dict, messages: list[Message]) -> str | None:
    """What differs where TRL converts from/value: it translates no role, and reads no system column."""
    turns = parse_cell(record[_pick(record, ("conversations", "conversation"))])
    turns = [turns] if isinstance(turns, dict) else turns
    for number, (turn, message) in enumerate(zip(turns, messages, strict=True), 1):
        if message.raw is None and turn["from"] != message.role:
            return f"turn {number} is from {turn['from']!r}, which TRL does not take for {message.role!r}; rename it"
    if messages[0].raw is None and len(_with_system(record, messages)) > len(messages):
        return "a system column beside from/value, which TRL does not read; make it a turn"
    return None


def _first(record: dict, names: Sequence[str]) -> str | None:
    """The first of these columns in the record; a non-empty one if there is any."""
    there = [name for name in names if name in record]
    return next((name for name in there if not is_missing(record[name])), there[0] if there else None)


def _pick(record: dict, names: Sequence[str]) -> str:
    key = _first(record, names)
    if key is None:
        raise SetAside(f"no column {' or '.join(names)}")
    return key


def column_of(record: dict, column: str) -> Any:
    if column not in record:
        raise SetAside(f"no column {column!r} (there are: {', '.join(map(str, record))})")
    return record[column]


def _check_columns(records: Sequence[dict], columns: dict[str, str]) -> None:
    there = list(dict.fromkeys(key for record in records for key in record))
    for target, column in columns.items():
        if target not in _TARGETS:
            raise UserError(f"--map {target}={column}: {target!r} is not one of {', '.join(_TARGETS)}")
        if column not in there:
            raise UserError(f"--map {target}={column}: no such column; the file has {', '.join(there)}")
    if not ("messages" in columns or "text" in columns or {"prompt", "response"} <= set(columns)):
        raise UserError("--map: name messages, or text, or both prompt and response")


def _filled(record: dict, *names: str) -> bool:
    return any(not is_missing(record.get(name)) for name in names)


def _is_preference(record: dict) -> bool:
    prompt = any(name in record for name in ("messages", "conversations", *PROMPTS))
    return _filled(record, "chosen") and (isinstance(record["chosen"], list) or prompt)


def _is_transcript(record: dict) -> bool:
    chosen = record.get("chosen")
    return _filled(record, "transcript") or bool(isinstance(chosen, str) and _TURN.match(chosen))


def _is_pair(record: dict) -> bool:
    return any(name in record for name in PROMPTS) and _filled(record, *RESPONSES)


Layout = tuple[Callable[[dict], bool], Callable[[dict, Rules], list[Message]]]
LAYOUTS: dict[str, Layout] = {  # whether a record has the layout's columns, the answer's filled, and how it is read
    "preference": (_is_preference, _from_chosen),
    "messages": (lambda record: _filled(record, "messages"), partial(_from_messages, keys=("messages",))),
    "sharegpt": (
        lambda record: _filled(record, "conversations", "conversation"),
        partial(_from_messages, keys=("conversations", "conversation")),
    ),
    "beavertails": (
        lambda record: "prompt" in record and "is_safe" in record and _filled(record, "response"),
        partial(from_pair, prompts=("prompt",), responses=("response",)),
    ),
    "alpaca": (
        lambda record: "instruction" in record and _filled(record, "output"),
        partial(from_pair, prompts=("instruction", "input"), responses=("output",)),
    ),
    "prompt_completion": (_is_pair, from_pair),
    "transcript": (_is_transcript, _from_transcript),
    "text": (
        lambda record: _filled(record, "text", "content"),
        lambda record, rules: [],  # no turns: `read_layout` takes the text itself
    ),
}
