"""What the dresses are made of: their registry, turns, and pieces of a request."""

from collections.abc import Callable

Msgs = list[dict]
DRESSES: dict[str, Callable[[str, str, int], Msgs]] = {}
GROUPS: dict[str, str] = {}


def dress(group: str):
    def add(fn):
        DRESSES[fn.__name__] = fn
        GROUPS[fn.__name__] = group
        return fn

    return add


def S(t):
    return {"role": "system", "content": t}


def U(t):
    return {"role": "user", "content": t}


def A(t):
    return {"role": "assistant", "content": t}


def T(t):
    return {"role": "tool", "content": t}


def pick(n: int, *options):
    return options[n % len(options)]


def soft(request: str) -> str:
    """The request as a clause: small first letter, no full stop at the end."""
    r = request.strip().rstrip(".!").rstrip()
    first = r.split(" ", 1)[0]
    if r and first not in ("I", "I'm", "I'd", "I've") and not first[1:2].isupper():
        r = r[0].lower() + r[1:]
    return r


def quote(request: str, mark: str = "> ") -> str:
    return "\n".join(mark + line for line in request.split("\n"))


def halves(request: str) -> tuple[str, str]:
    words = request.split(" ")
    if len(words) < 2:
        return request, "(that was all)"
    cut = max(1, len(words) // 2)
    return " ".join(words[:cut]), " ".join(words[cut:])
