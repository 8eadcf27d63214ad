"""Turns: the messages of a row, as the chosen trainer reads them."""

from dataclasses import dataclass, field
from numbers import Number
from typing import Any

from gradshield.data.limits import load_json
from gradshield.data.records import bad_text
from gradshield.data.trainers import Rules

_ROLES = {
    "system": ("system",),
    "developer": ("developer",),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "chatgpt", "bard", "bing", "bot", "model", "function_call"),
    "tool": ("tool", "function", "observation", "ipython"),
}
ROLE_OF = {name: role for role, names in _ROLES.items() for name in names}
_TEXT_PARTS = ("text", "input_text", "output_text")


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: str  # "system" | "developer" | "user" | "assistant" | "tool"
    content: str
    train: bool = True  # False for an assistant turn that the trainer does not train on
    extra: dict | None = None  # what else a chat template may read: tool_calls, reasoning_content, name, ...
    raw: dict | None = field(default=None, compare=False, repr=False)  # the turn as the row has it, for the template
    prompt: bool = field(default=False, compare=False)  # of a prompt that the trainer also renders by itself


class SetAside(Exception):
    """The reason why a record can't be read in its layout."""


def parse_turns(value: Any, role: str | None, what: str, rules: Rules) -> list[Message]:
    """Turns from a list of them, from one (a dict), or from a text spoken by `role`. Raises SetAside."""
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list):
        if not value:
            raise SetAside(f"{what} is empty")
        turns = [_message(turn, f"turn {number}", rules) for number, turn in enumerate(value, 1)]
        named = [turn.raw is not None for turn in turns]
        if rules.verbatim and any(named) and not all(named):
            raise SetAside(f"turn {named.index(False) + 1} has no role but others have; TRL reads it from no other key")
        return turns
    if role is None:
        raise SetAside(f"{what} is missing" if is_missing(value) else f"{what} is not a list of turns")
    return [Message(role, text(value, what))]


def _message(turn: Any, what: str, rules: Rules) -> Message:
    if not isinstance(turn, dict):
        raise SetAside(f"{what} is not an object with a role and a content")
    named, content = _one_of(turn, "role", "from", what), _one_of(turn, "content", "value", what)
    name = str(named or "").strip().lower()
    role = ROLE_OF.get(name)
    if role is None:
        raise SetAside(f"{what} has the unknown role {named!r}" if named else f"{what} has no role")
    raw = turn if rules.verbatim and turn.get("role") else None
    if raw is not None and named != role:
        raise SetAside(f"{what} has the role {named!r}, which TRL does not take for {role!r}; rename it")
    if raw is not None and is_missing(raw.get("content")) and not is_missing(content):
        raise SetAside(f"{what} has its text under value, which TRL does not read beside a role; rename it to content")
    # Parquet fills in every key of a struct, so empty ones say nothing.
    known = ("role", "from", "content", "value", "weight", "train", "training")
    extra = {key: value for key, value in turn.items() if key not in known and not is_missing(value) and value != []}
    if call := parse_cell(extra.pop("function_call", None)):
        if not rules.functions:
            raise SetAside(f"{what} ({role}) has a function_call, which the trainer does not read; make it tool_calls")
        extra["tool_calls"] = [{"type": "function", "function": call}]
    if name == "function_call":
        calls = parse_cell(content)
        calls = calls if isinstance(calls, list) else [calls]
        if all(isinstance(call, dict) for call in calls):
            extra["tool_calls"], content = [{"type": "function", "function": call} for call in calls], ""
    if calls := extra.pop("tool_calls", None):  # a malformed one would leave a response of end tokens only
        if isinstance(calls, str):
            raise SetAside(f"{what} ({role}) has tool calls as text, which no trainer parses; make them a list")
        if not called_functions(calls):
            raise SetAside(f"{what} ({role}) has tool calls that name no function")
        extra["tool_calls"] = calls
    off = role == "assistant" and any(turn[key] == 0 for key in rules.off if key in turn)
    if is_missing(content) and role == "assistant" and ("tool_calls" in extra or off):
        content = ""
    return Message(role, _content(content, f"{what} ({role})"), not off, extra or None, raw)


def _one_of(turn: dict, name: str, other: str, what: str) -> Any:
    """The value under either name, which a turn may carry twice only if both say the same."""
    values = [turn[key] for key in (name, other) if not is_missing(turn.get(key))]
    if len(values) == 2 and values[0] != values[1]:
        raise SetAside(f"{what} has both {name} and {other}, and they differ; drop one")
    return values[0] if values else None


def called_functions(calls: Any) -> list[str]:
    """The functions' names in a turn's tool calls; none unless they are a list in which each call names its own."""
    calls = calls if isinstance(calls, list) else []
    functions = [call.get("function", call) if isinstance(call, dict) else None for call in calls]
    names = [function.get("name") if isinstance(function, dict) else None for function in functions]
    named = [name for name in names if isinstance(name, str) and name]
    return named if len(named) == len(calls) else []


def required_texts(message: Message) -> list[str]:
    """What a response must hold: the names of the tools called, and the words (of each part) after any reasoning."""
    content = (message.raw or {}).get("content")
    words = [_part(part, "") for part in content] if isinstance(content, list) else [message.content]
    return [
        *called_functions((message.extra or {}).get("tool_calls")),
        *(w.rpartition("</think>")[2].strip() for w in words),
    ]


def _content(content: Any, what: str) -> str:
    """A turn's text; a list of text parts is joined without a separator."""
    if not isinstance(content, list):
        return text(content, what)
    return "".join(_part(part, what) for part in content)


def _part(part: Any, what: str) -> str:
    if isinstance(part, dict):
        kind = part.get("type") or "text"
        if kind not in _TEXT_PARTS:
            raise SetAside(f"{what} has a part of type {kind!r}; only text can be scored")
        part = part.get("text")
    return text(part, what)


def text(value: Any, what: str) -> str:
    """The value as text. Raises SetAside if it is missing or not text."""
    if is_missing(value):
        raise SetAside(f"{what} is missing")
    if isinstance(value, str | Number):
        return str(value)
    raise SetAside(f"{what} holds a {type(value).__name__} where text should be")


def is_missing(value: Any) -> bool:
    """Whether the value is null or NaN."""
    return value is None or (isinstance(value, float) and value != value)


def parse_cell(value: Any) -> Any:
    """A list or object that a CSV file holds as JSON text; any other value as it is. Raises SetAside for bad text."""
    if not isinstance(value, str):
        return value
    try:
        found = load_json(value)
        problem = bad_text(found) if "\\u" in value else None  # its escapes were plain text when the row was read
    except (ValueError, RecursionError):
        return value
    if problem:
        raise SetAside(problem)
    return found
