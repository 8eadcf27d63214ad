"""What the dresses are made of: their registry, turns, and pieces of a request."""

import re
from collections.abc import Callable

Messages = list[dict[str, str]]
Dress = Callable[[str, str, int], Messages]
DRESSES: dict[str, Dress] = {}
GROUPS: dict[str, str] = {}


def dress(group: str) -> Callable[[Dress], Dress]:
    def add(function: Dress) -> Dress:
        DRESSES[function.__name__] = function
        GROUPS[function.__name__] = group
        return function

    return add


def pick(n: int, *options: str) -> str:
    return options[n % len(options)]


def chat(*texts: str, system: str = "") -> Messages:
    """User and assistant in turn, beginning with the user; before them the system prompt, if any."""
    head = [{"role": "system", "content": system}] if system else []
    return head + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def lower_first(text: str) -> str:
    """'Write a poem' -> 'write a poem'; 'I need', 'SQL ...' stay as they are."""
    keep = re.match(r"I\b|[A-Z]{2}", text)
    return text if keep else text[:1].lower() + text[1:]


def is_question(text: str) -> bool:
    return bool(re.search(r"\?\s*$|^\s*(what|how|why|who|where|when|which)\b", text, re.IGNORECASE))


def bare(text: str) -> str:
    return text.strip().rstrip(".?! ")


def halves(text: str) -> tuple[str, str]:
    spaces = [i for i, char in enumerate(text) if char == " "]
    middle = spaces[len(spaces) // 2] if spaces else (len(text) + 1) // 2
    return text[:middle].rstrip(), text[middle:].lstrip()


def prefixed(text: str, mark: str) -> str:
    return "\n".join(mark + line for line in text.splitlines())
