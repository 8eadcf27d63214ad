"""Record → conversation, as the chosen trainer reads it, whatever else the record holds.

A second layout, ready tokens or pictures: trainers differ in what they read of such a row. Where all that could be read
says the same, the row is scored. Else it is set aside, and the reason names the columns. What TRL reads must be the
same to the letter, with reasoning and tool calls; other layouts may frame it otherwise, as a rendered `text` does.
"""

import re
from collections.abc import Iterator
from dataclasses import replace

from gradshield.data.formats import (
    LAYOUTS,
    PROMPTS,
    RESPONSES,
    VARIABLES,
    Conversation,
    NoAnswer,
    checked_conversation,
    column_of,
    detect_layout,
    from_pair,
    read_layout,
)
from gradshield.data.trainers import RULES, Rules
from gradshield.data.turns import SetAside, is_missing

_TOKENS = ("input_ids", "labels")
# TRL looks whether these columns are there, not what they hold, so that one row stops it for the whole file.
_BY_PRESENCE = {"input_ids": "tokens", "labels": "token labels"}
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_TURN_LISTS = ("preference", "messages", "sharegpt")
_PAIRS = ("beavertails", "alpaca", "prompt_completion")
# (column, layout, the column that the layout reads first)
_SECOND = (("conversation", "sharegpt", "conversations"), ("chosen", "transcript", "transcript"))
# What prompt formats write around the turns, so that a rendered `text` column says the same as the turns do.
_FRAME = (
    r"(?:[\s#*:<>|｜\[\]/=_.,-]|below is an instruction that describes a task"
    r"|paired with an input that provides further context|write a response that appropriately completes the request"
    r"|im_start|im_end|start_header_id|end_header_id|eot_id|begin_of_text|instruction|input|response|output|question"
    r"|answer|human|user|assistant|system|inst|sys|s\b)+"
)
_OPENING = re.compile(_FRAME, re.IGNORECASE)
_CLOSING = re.compile(r"(?:\s|</?s>|<\|(?:im_end|eot_id|eom_id|endoftext|end_of_text|end)\|>|\[/?INST\])+\Z")
_LONGEST_CLOSING = 80  # characters: a bound, since a search for the end of a line can be quadratic


def to_conversation(
    record: dict, layout: str, columns: dict[str, str] | None = None, trainer: str = "trl"
) -> Conversation | str:
    """The record as the trainer reads it, or the reason to set the row aside."""
    rules = RULES[trainer]
    try:
        if layout == "mapped":
            # renaming the named columns leaves one of the other layouts
            named = {
                target: column_of(record, column)
                for target, column in (columns or {}).items()
                if target != "system" or column in record  # not every conversation has one
            }
            record = {name: record[name] for name in ("tools", VARIABLES) if name in record} | named
            layout = next((name for name in ("messages", "text") if name in record), "prompt_completion")
            return read_layout(record, layout, replace(rules, system=True))
        if not LAYOUTS[layout][0](record):
            layout = detect_layout([record]) or layout
        conversation = read_layout(record, layout, rules)
        _refuse_beside(record, layout, conversation, rules)
        if rules.verbatim:
            _refuse_what_stops_trl(record)
        return conversation
    except SetAside as reason:
        return str(reason)


def _refuse_beside(record: dict, layout: str, conversation: Conversation, rules: Rules) -> None:
    """Raises SetAside if a trainer could read other content from the record than this conversation."""
    filled = {name: value for name, value in record.items() if not is_missing(value) and value not in ("", [], {})}
    pair = {name: record[name] for name in ("prompt", "completion") if isinstance(record.get(name), str)}
    if rules.verbatim and any(pair.values()):
        filled |= pair  # TRL may train on one of them beside a blank other
    for name in _TOKENS:
        if isinstance(filled.get(name), list):
            raise SetAside(f"{name} beside {layout}: TRL trains on these tokens, not on the text; drop the column")
    for name in _MEDIA:
        if name in filled:
            raise SetAside(f"{name} beside {layout}: only text can be scored")
    for other, alternative in _readings(filled, layout, rules):
        exact = rules.verbatim and other in ("messages", "sharegpt", "prompt and completion")
        exact |= rules.verbatim and other == "prompt_completion" and {"prompt", "completion"} <= set(filled)
        if not (_repeats if exact else _covers)(conversation, alternative):
            raise SetAside(
                f"{layout} beside {other}, with other content: trainers differ in which one they read; drop one, or "
                "name the columns with --map"
            )


def _refuse_what_stops_trl(record: dict) -> None:
    """Raises SetAside if TRL fails on the row, or on every row of a file that contains it."""
    for name, what in _BY_PRESENCE.items():
        if name in record:
            raise SetAside(f"column {name}: TRL takes it for {what}, even if it is something else; drop or rename it")
    for name in ("messages", "prompt", "completion", "conversations"):
        if record.get(name) == []:
            raise SetAside(f"{name} is an empty list, on which TRL fails; drop it from this row")
    pair = [record[name] for name in ("prompt", "completion") if not is_missing(record.get(name))]
    lists = [isinstance(value, list) for value in pair]
    if len(pair) == 2 and not all(lists) and any(isinstance(value, list | dict) for value in pair):
        raise SetAside("prompt and completion are not both lists of turns, so TRL can't join them; make both the same")


def _readings(record: dict, layout: str, rules: Rules) -> Iterator[tuple[str, Conversation]]:
    """(name, conversation) for everything that could be read from the record besides its layout."""
    others = [(other, other, record) for other in LAYOUTS if other != layout]
    for column, other, first in _SECOND:
        without = {name: value for name, value in record.items() if name != first}
        others += [(column, other, without)] if {column, first} <= set(record) else []
    if layout == "preference":
        asked = [name for name in ("messages", "conversations", *PROMPTS) if name in record and name != "input"]
        for name in asked:
            only_this = {key: value for key, value in record.items() if key == name or key not in asked}
            others += [(f"{name} and chosen", layout, only_this)]
    for name, other, given in others:
        if not LAYOUTS[other][0](given) or (other == "text" and not _reads_text(record, layout, rules)):
            continue
        try:
            yield name, read_layout(given, other, rules)
        except NoAnswer:
            continue
        except SetAside as reason:
            known = other in ("messages", "sharegpt", "text") or {"prompt", "completion"} <= set(record)  # TRL reads it
            if known and name == other:
                raise SetAside(f"{layout} beside {other}, which can't be read: {reason}") from None
    if layout in _PAIRS:
        prompts = [name for name in PROMPTS if name in record and name != "input"]
        for prompt in prompts or ["input"] * ("input" in record):
            for response in (name for name in RESPONSES if name in record):
                turns = from_pair(record, rules, (prompt,), (response,))
                yield f"{prompt} and {response}", checked_conversation(turns, None)


def _reads_text(record: dict, layout: str, rules: Rules) -> bool:
    """Whether TRL would train on `text`, because it finds no other column that it knows."""
    if "text" not in record or {"prompt", "completion"} <= set(record):
        return False
    if not rules.verbatim:
        return layout not in _TURN_LISTS
    turns = record.get("conversations")
    named = isinstance(turns, list) and isinstance(turns[0], dict) and {"from", "value"} <= set(turns[0])
    return not named and not isinstance(record.get("messages"), list)


def _repeats(scored: Conversation, other: Conversation) -> bool:
    """Whether the other conversation's turns are the first of this one, to the letter, and none is trained on there
    alone."""
    return (
        other.text is None
        and len(other.messages) <= len(scored.messages)
        and all(
            (a.role, a.content, a.extra) == (b.role, b.content, b.extra) and (a.train or not b.train)
            for a, b in zip(scored.messages, other.messages)
        )
    )


def _covers(scored: Conversation, other: Conversation) -> bool:
    """Whether all that would be trained on in the other conversation is trained on, after the same turns, in this."""
    if scored.text is not None or other.text is not None:
        return _lines(scored) == _lines(other)
    ours, theirs = ([m for m in c.messages if m.role not in ("system", "developer")] for c in (scored, other))
    return len(theirs) <= len(ours) and all(
        b.role == a.role and (a.train or not b.train) and _plain_lines(a.content) == _plain_lines(b.content)
        for a, b in zip(ours, theirs)
    )


def _lines(conversation: Conversation) -> list[str]:
    if conversation.text is not None:
        return _plain_lines(conversation.text)
    return [line for message in conversation.messages for line in _plain_lines(message.content)]


def _plain_lines(text: str) -> list[str]:
    """The text's lines without what a prompt format writes around them, blank ones left out."""
    return [said for line in text.splitlines() if (said := _without_markup(line))]


def _without_markup(line: str) -> str:
    line = line.strip()
    head, tail = line[:-_LONGEST_CLOSING], line[-_LONGEST_CLOSING:]
    bare = (head + _CLOSING.sub("", tail)).strip()
    return " ".join(bare[opening.end() if (opening := _OPENING.match(bare)) else 0 :].split())
