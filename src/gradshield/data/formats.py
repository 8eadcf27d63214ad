r"""Record → conversation, for the layouts that public fine-tuning data come in.

A record's layout is told by its columns. Where several fit, the first of this table wins:

| layout            | columns                              | becomes                                        |
|-------------------|--------------------------------------|------------------------------------------------|
| messages          | messages                             | its turns; those of `weight: 0` are not        |
|                   |                                      | trained on                                     |
| preference        | chosen, with one of `_PROMPTS` or    | the prompt and the chosen answer, never the    |
|                   | conversations, or as a list of turns | rejected one                                   |
| sharegpt          | conversations or conversation        | its turns (from/value or role/content)         |
| beavertails       | prompt, response, is_safe            | prompt and response; the rest are labels       |
| alpaca            | instruction, output                  | (history and) instruction + "\n" + input, as   |
|                   | (input, system, history)             | LLaMA-Factory joins them, and output           |
| prompt_completion | one of `_PROMPTS` and                | both, either of them a text or a list of turns |
|                   | one of `_RESPONSES`                  | (TRL); an instruction takes `input`, `context` |
| transcript        | transcript, or chosen in the form    | its turns, outer blanks stripped               |
|                   | "\n\nHuman: ...\n\nAssistant: ..."   |                                                |
| text              | text or content                      | plain text; other columns are ignored          |
| mapped            | as `columns` says                    | messages, text, or (system,) prompt, response  |

Every layout but text takes `tools` and `chat_template_kwargs`, and `system` or `system_prompt` unless its turns open
with a system turn. Numbers and booleans where text should be are read as `str` gives them ("3", "True"), as from a CSV
file; null and NaN are missing.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from numbers import Number
from typing import Any

from gradshield.base.errors import UserError
from gradshield.data.records import bad_text

_PROMPTS = ("prompt", "instruction", "question", "query", "input")
_RESPONSES = ("completion", "response", "answer", "output")
_SYSTEM = ("system", "system_prompt")
_VARIABLES = "chat_template_kwargs"
_TARGETS = ("messages", "text", "prompt", "response", "system")  # what --columns can name
_ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "chatgpt", "bard", "bing", "bot", "model", "function_call"),
    "tool": ("tool", "function", "observation", "ipython"),
}
_ROLE_OF = {name: role for role, names in _ROLES.items() for name in names}
_TURN = re.compile(r"(?:\A\s*|(?:\r?\n){2})(Human|Assistant):")  # the HH and red-team transcripts


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: str  # "system" | "user" | "assistant" | "tool"
    content: str
    train: bool = True  # False for an assistant turn of `weight: 0`
    extra: dict | None = None  # what else a chat template may read: tool_calls, reasoning_content, name, ...


@dataclass(frozen=True)
class Conversation:
    """What a model is trained on in one row: turns, or plain text."""

    messages: tuple[Message, ...]  # empty when `text` is used
    text: str | None = None  # the loss is on every token
    tools: list | None = None
    variables: dict | None = None  # what else the row tells its chat template (TRL's `chat_template_kwargs`)


class _SetAside(Exception):
    """The reason why a record can't be read as its layout says."""


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


def to_conversation(record: dict, layout: str, columns: dict[str, str] | None = None) -> Conversation | str:
    """The record as a conversation, or the reason to set its row aside."""
    try:
        if layout == "mapped":
            # renaming the named columns leaves one of the other layouts
            named = {
                target: _column(record, column)
                for target, column in (columns or {}).items()
                if target != "system" or column in record  # not every conversation has one
            }
            record = {name: record.get(name) for name in ("tools", _VARIABLES)} | named
            layout = next((name for name in ("messages", "text") if name in record), "prompt_completion")
        if layout == "text":
            return _text_row(record)
        _, turns_of = LAYOUTS[layout]
        conversation = _check(_with_system(record, turns_of(record)), _list(record, "tools") or None)
        return replace(conversation, variables=_variables(record))
    except _SetAside as reason:
        return str(reason)


def _check(messages: list[Message], tools: list | None) -> Conversation:
    """The conversation, if there is something in it to train on and to answer."""
    answers = [message for message in messages if message.role == "assistant"]
    if not answers:
        raise _SetAside("no assistant turn")
    if not any(message.role in ("user", "system") for message in messages):
        raise _SetAside("no user or system turn")
    if not any(message.train for message in answers):
        raise _SetAside("every assistant turn has weight 0")
    if any(m.train and not m.content.strip() and "tool_calls" not in (m.extra or {}) for m in answers):
        raise _SetAside("empty response")
    return Conversation(tuple(messages), tools=tools)


def _from_pair(record: dict, prompts: Sequence[str] = _PROMPTS, responses: Sequence[str] = _RESPONSES) -> list[Message]:
    before = []
    for turn in _list(record, "history"):
        if not isinstance(turn, list | tuple) or len(turn) != 2:
            raise _SetAside("history is not a list of [prompt, response] pairs")
        before += [
            Message("user", _text(turn[0], "history")),
            Message("assistant", _text(turn[1], "history")),
        ]
    key, response = _pick(record, prompts), _pick(record, responses)
    return before + _turns(_asked(record, key), "user", key) + _turns(record[response], "assistant", response)


def _asked(record: dict, key: str) -> Any:
    """The prompt; an instruction with its input or context, where there is one."""
    more = _first(record, ("input", "context")) if key == "instruction" else None
    if more is None or _missing(record[more]) or _missing(record[key]):
        return record[key]
    return "\n".join(filter(None, (_text(record[key], key), _text(record[more], more))))


def _from_messages(record: dict) -> list[Message]:
    key = _pick(record, ("messages", "conversations", "conversation"))
    return _turns(_parsed(record[key]), None, key)


def _from_chosen(record: dict) -> list[Message]:
    chosen = record[_pick(record, ("chosen",))]
    opening = _TURN.match(chosen) if isinstance(chosen, str) else None
    if opening and opening[1] == "Human":
        return _transcript(chosen)
    key = _first(record, ("conversations", *_PROMPTS))
    asked = None if key is None else _asked(record, key)
    if isinstance(chosen, str) and isinstance(asked, str) and _TURN.match(asked):
        return _transcript(asked + ("\n\n" if opening else "") + chosen)  # "Assistant:" ends the one or opens the other
    if opening:
        return _transcript(chosen)
    if key is None:
        return _turns(chosen, None, "chosen")
    answer = _turns(chosen, "assistant", "chosen")
    if answer[0].role in ("user", "system"):
        return answer  # the whole conversation, prompt and all
    return _turns(asked, "user", key) + answer


def _from_transcript(record: dict) -> list[Message]:
    return _transcript(_text(record[_pick(record, ("transcript", "chosen"))], "transcript"))


def _text_row(record: dict) -> Conversation:
    key = _pick(record, ("text", "content"))
    text = _text(record[key], key)
    if not text.strip():
        raise _SetAside("empty text")
    return Conversation((), text=text)


def _transcript(text: str) -> list[Message]:
    start, *rest = _TURN.split(text)
    if not rest or start.strip():
        raise _SetAside('not a transcript of "Human:" and "Assistant:" turns')
    roles, contents = rest[::2], rest[1::2]
    return [Message(_ROLE_OF[role.lower()], body.strip()) for role, body in zip(roles, contents, strict=True)]


def _turns(value: Any, role: str | None, what: str) -> list[Message]:
    """Turns from a list of them, from one (a dict), or from a text spoken by `role`."""
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list):
        if not value:
            raise _SetAside(f"{what} is empty")
        return [_message(turn, f"turn {number}") for number, turn in enumerate(value, 1)]
    if role is None:
        raise _SetAside(f"{what} is missing" if _missing(value) else f"{what} is not a list of turns")
    return [Message(role, _text(value, what))]


def _message(turn: Any, what: str) -> Message:
    if not isinstance(turn, dict):
        raise _SetAside(f"{what} is not an object with a role and a content")
    named = turn.get("role") or turn.get("from")
    role = _ROLE_OF.get(str(named).strip().lower())
    if role is None:
        raise _SetAside(f"{what} has the unknown role {named!r}" if named else f"{what} has no role")
    content = turn.get("content") if turn.get("content") is not None else turn.get("value")
    # Parquet fills in every key of a struct, so empty ones say nothing.
    known = ("role", "from", "content", "value", "weight")
    extra = {key: value for key, value in turn.items() if key not in known and not _missing(value) and value != []}
    if call := _parsed(extra.pop("function_call", None)):  # OpenAI's older form of a tool call
        extra["tool_calls"] = [{"type": "function", "function": call}]
    if str(named).strip().lower() == "function_call":
        calls = _parsed(content)
        calls = calls if isinstance(calls, list) else [calls]
        if all(isinstance(call, dict) for call in calls):
            extra["tool_calls"], content = [{"type": "function", "function": call} for call in calls], ""
    calls = _parsed(extra.pop("tool_calls", None))
    if calls:  # a malformed one would be rendered as nothing, and leave a response of end tokens only
        if not called(calls):
            raise _SetAside(f"{what} ({role}) has tool calls that name no function")
        extra["tool_calls"] = calls
    if _missing(content) and role == "assistant" and ("tool_calls" in extra or turn.get("weight") == 0):
        content = ""
    train = not (role == "assistant" and turn.get("weight") == 0)
    return Message(role, _content(content, f"{what} ({role})"), train, extra or None)


def called(calls: Any) -> list[str]:
    """The functions' names in a turn's tool calls; none unless they are a list in which each call names its own."""
    calls = calls if isinstance(calls, list) else []
    functions = [call.get("function", call) if isinstance(call, dict) else None for call in calls]
    names = [function.get("name") if isinstance(function, dict) else None for function in functions]
    named = [name for name in names if isinstance(name, str) and name]
    return named if len(named) == len(calls) else []


def _content(content: Any, what: str) -> str:
    """A turn's text; a list of text parts is joined without a separator, as chat templates join them."""
    if not isinstance(content, list):
        return _text(content, what)
    texts = []
    for part in content:
        if isinstance(part, dict):
            kind = part.get("type") or "text"
            if kind not in ("text", "input_text", "output_text"):
                raise _SetAside(f"{what} has a part of type {kind!r}; only text can be scored")
            part = part.get("text")
        texts.append(_text(part, what))
    return "".join(texts)


def _text(value: Any, what: str) -> str:
    if _missing(value):
        raise _SetAside(f"{what} is missing")
    if isinstance(value, str | Number):
        return str(value)
    raise _SetAside(f"{what} holds a {type(value).__name__} where text should be")


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value)


def _parsed(value: Any) -> Any:
    """A list or object that a CSV file holds as JSON text; any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        parsed = json.loads(value)
        problem = bad_text(parsed) if "\\u" in value else None  # its escapes were plain text when the row was read
    except (ValueError, RecursionError):
        return value
    if problem:
        raise _SetAside(problem)
    return parsed


def _list(record: dict, column: str) -> list:
    """The list in a column, also as JSON text; empty where there is none."""
    value = _parsed(record.get(column))
    if _missing(value) or not value:
        return []
    if not isinstance(value, list):
        raise _SetAside(f"{column} is not a list")
    return value


def _variables(record: dict) -> dict | None:
    value = _parsed(record.get(_VARIABLES))
    if _missing(value) or value == "":
        return None
    if not isinstance(value, dict):
        raise _SetAside(f"{_VARIABLES} is not an object")
    return value


def _with_system(record: dict, messages: list[Message]) -> list[Message]:
    key = _first(record, _SYSTEM)
    if key is None or not record[key] or _missing(record[key]) or messages[0].role == "system":
        return messages
    return [Message("system", _text(record[key], key)), *messages]


def _first(record: dict, names: Sequence[str]) -> str | None:
    """The first of these columns that the record has, filled if any of them is."""
    there = [name for name in names if name in record]
    return next((name for name in there if not _missing(record[name])), there[0] if there else None)


def _pick(record: dict, names: Sequence[str]) -> str:
    key = _first(record, names)
    if key is None:
        raise _SetAside(f"no column {' or '.join(names)}")
    return key


def _column(record: dict, column: str) -> Any:
    if column not in record:
        raise _SetAside(f"no column {column!r} (there are: {', '.join(map(str, record))})")
    return record[column]


def _check_columns(records: Sequence[dict], columns: dict[str, str]) -> None:
    there = list(dict.fromkeys(key for record in records for key in record))
    for target, column in columns.items():
        if target not in _TARGETS:
            raise UserError(f"columns: {target!r} is not one of {', '.join(_TARGETS)}; name one of these")
        if column not in there:
            raise UserError(f"columns: no column {column!r} for {target}; the columns are {', '.join(there)}")
    if not ("messages" in columns or "text" in columns or {"prompt", "response"} <= set(columns)):
        raise UserError("columns: name messages, or text, or both prompt and response")


def _has(*names: str) -> Callable[[dict], bool]:
    return lambda record: all(name in record for name in names)


def _any(names: Sequence[str]) -> Callable[[dict], bool]:
    return lambda record: any(name in record for name in names)


def _is_preference(record: dict) -> bool:
    return "chosen" in record and (isinstance(record["chosen"], list) or _any(("conversations", *_PROMPTS))(record))


def _is_transcript(record: dict) -> bool:
    return "transcript" in record or bool(isinstance(record.get("chosen"), str) and _TURN.match(record["chosen"]))


def _is_pair(record: dict) -> bool:
    return _any(_PROMPTS)(record) and _any(_RESPONSES)(record)


LAYOUTS: dict[str, tuple[Callable[[dict], bool], Callable[[dict], list[Message]]]] = {
    "messages": (_has("messages"), _from_messages),
    "preference": (_is_preference, _from_chosen),
    "sharegpt": (_any(("conversations", "conversation")), _from_messages),
    "beavertails": (
        _has("prompt", "response", "is_safe"),
        partial(_from_pair, prompts=("prompt",), responses=("response",)),
    ),
    "alpaca": (
        _has("instruction", "output"),
        partial(_from_pair, prompts=("instruction", "input"), responses=("output",)),
    ),
    "prompt_completion": (_is_pair, _from_pair),
    "transcript": (_is_transcript, _from_transcript),
    "text": (_any(("text", "content")), lambda record: []),  # no turns: `to_conversation` reads it itself
}
