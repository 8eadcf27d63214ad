"""The making of hostile models: named changes to a sound one's folder."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

Change = Callable[[Path, random.Random], list[str] | None]  # changes a folder, and returns arguments of check or None
CASES: dict[str, tuple[str, Change]] = {}  # name → (what is changed: "llama", "gpt2", "adapter", "gguf"; the change)

VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    3,
    7,
    2**31,
    2**63,
    10**30,
    0.5,
    -1e300,
    float("nan"),
    float("inf"),
    "",
    "x",
    "1e9",
    [],
    [1],
    {},
    {"a": 1},
    [[]],
    "\u202e\x1b[31m",
    "../../../etc/passwd",
    "x" * 5000,
)


def case(kind: str, *names: str) -> Callable[[Change], Change]:
    def keep(change: Change) -> Change:
        for name in names or (change.__name__,):
            CASES[f"{kind}: {name}"] = (kind, change)
        return change

    return keep


def edit(file: Path, change: Callable[[dict], Any]) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps(change(content) or content))


def setting(kind: str, file: str, **values: Any) -> None:
    """A case for each value: the file's key has it."""
    for key, value in values.items():
        name = f"{file}: {key} = {str(value)[:40]!r}"
        CASES[f"{kind}: {name}"] = (kind, lambda folder, _, k=key, v=value: edit(folder / file, lambda c: c | {k: v}))


def tensors(change: Callable[[dict, random.Random], Any]) -> Change:
    """The weights, changed as a dictionary."""

    def apply(folder: Path, draw: random.Random) -> None:
        from safetensors.torch import load_file, save_file

        file = next(folder.glob("*.safetensors"))
        content = load_file(file)
        content = change(content, draw) or content
        save_file({k: v.contiguous() for k, v in content.items()}, file, {"format": "pt"})

    return apply


def without(part: str) -> Change:
    return tensors(lambda content, _: {k: v for k, v in content.items() if part not in k})


def filled(value: float) -> Change:
    return tensors(lambda content, draw: content[draw.choice(sorted(content))].fill_(value) is None or None)


def written(file: str, content: bytes) -> Change:
    return lambda folder, _: (folder / file).write_bytes(content) and None


PICKLE = b"\x80\x04\x8c\x05posix\x94\x8c\x06system\x94\x93\x94\x8c\x04true\x94\x85\x94R\x94."  # runs `true`
