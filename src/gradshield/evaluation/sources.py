"""Public sets by name: from the folder that GRADSHIELD_DATA names where they lie there, else from where they are open.

Nothing of them is kept here. Harmful requests are asked, never shown how to fulfil: only their prompts are read.
"""

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from gradshield.base.assets import ASSETS
from gradshield.base.errors import UserError, one_line
from gradshield.base.storage import read_jsonl
from gradshield.data.requests import read_requests
from gradshield.data.rows import expanded

T = TypeVar("T")


@dataclass(frozen=True)
class PublicSet:
    """Where the records of a public set are stored."""

    file: str  # NAME of NAME.jsonl in GRADSHIELD_DATA
    hub: tuple[str, ...]  # arguments of datasets.load_dataset: id and perhaps configuration, or "csv" and an address
    split: str = "train"


_GITHUB = "https://raw.githubusercontent.com/"
HARMFUL = {
    "advbench": PublicSet(
        "advbench",
        ("csv", _GITHUB + "llm-attacks/llm-attacks/main/data/advbench/harmful_behaviors.csv"),
    ),
    "harmbench": PublicSet(
        "harmbench",
        ("csv", _GITHUB + "centerforaisafety/HarmBench/main/data/behavior_datasets/harmbench_behaviors_text_all.csv"),
    ),
    "strongreject": PublicSet(
        "strongreject",
        ("csv", _GITHUB + "alexandrasouly/strongreject/main/strongreject_dataset/strongreject_dataset.csv"),
    ),
    "jailbreakbench": PublicSet("jbb_harmful", ("JailbreakBench/JBB-Behaviors", "behaviors"), "harmful"),
}
SCARY = {"jailbreakbench": PublicSet("jbb_benign", ("JailbreakBench/JBB-Behaviors", "behaviors"), "benign")}
UNSEEN = Path(__file__).with_name("unseen_requests.jsonl")
_PROMPT_COLUMNS = ("prompt", "goal", "Goal", "forbidden_prompt", "Behavior")


def harmful_requests(name: str, count: int, seed: int = 0) -> list[str]:
    """`count` harmful requests (all, where there are fewer) of the set called `name`: "bundled", a key of HARMFUL, or
    a file as `read_requests` takes it. One that occurs twice is asked once. Raises UserError for an unknown or
    unavailable set."""
    return choose(_requests(name, "safety_requests.jsonl", HARMFUL), count, seed)


def unseen_requests(name: str, count: int, seed: int = 0) -> list[str]:
    """As many requests that `harmful_requests` with these arguments leaves out, for a figure that no decision rests on;
    fewer or none where the set ends. Those of "bundled" are in a file that nothing else reads."""
    if name == "bundled":
        return choose(read_requests(UNSEEN), count, seed)
    asked = set(harmful_requests(name, count, seed))
    return choose([r for r in _requests(name, "", HARMFUL) if r not in asked], count, seed)


def scary_requests(name: str, count: int, seed: int = 0) -> list[str]:
    """As `harmful_requests`, of harmless requests that look scary; none for "none"."""
    return [] if name == "none" else choose(_requests(name, "scary_requests.jsonl", SCARY), count, seed)


def _requests(name: str, bundled: str, known: dict[str, PublicSet]) -> list[str]:
    if name == "bundled":
        found = read_requests(ASSETS / bundled)
    elif name in known:
        # HarmBench's contextual and copyright behaviours are no requests by themselves
        read = [(r, parse_record(name, _prompt, r)) for r in public_records(known[name])]
        found = [prompt for r, prompt in read if r.get("FunctionalCategory", "standard") == "standard"]
    elif expanded(name).is_file():
        found = read_requests(expanded(name))
    else:
        raise UserError(f"{name}: not a file, and not a known set (bundled, {', '.join(known)})")
    if not found:
        raise UserError(f"{name}: holds no requests")
    return list(dict.fromkeys(found))  # asked twice, a request would count twice


def _prompt(record: dict[str, Any]) -> str:
    return record[next(c for c in _PROMPT_COLUMNS if record.get(c))].strip()


def parse_record(name: str, read: Callable[[dict[str, Any]], T], record: Any) -> T:
    """What `read` makes of a record of the set called `name`. Raises UserError where its columns are others."""
    try:
        return read(record)
    except (LookupError, TypeError, ValueError, AttributeError, StopIteration):
        has = ", ".join(map(str, record))[:80] if isinstance(record, dict) else type(record).__name__
        raise UserError(f"{name}: unexpected columns (expected: {has}); download it again") from None


def choose(items: Sequence[T], count: int, seed: int) -> list[T]:
    """`count` of the items, the same ones for a seed, in their order; all where there are fewer."""
    if count >= len(items):
        return list(items)
    return [items[i] for i in sorted(random.Random(seed).sample(range(len(items)), count))]


def public_records(source: PublicSet) -> list[dict[str, Any]]:
    """All records of a public set. Raises UserError when it is neither in GRADSHIELD_DATA nor to be reached."""
    folder = os.environ.get("GRADSHIELD_DATA")
    file = Path(folder or ".", f"{source.file}.jsonl")
    if folder and file.is_file():
        try:
            return read_jsonl(file)
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: can't be read as JSON lines ({error}); download it again") from None
    import datasets

    try:
        if source.hub[0] == "csv":
            found = datasets.load_dataset("csv", data_files=source.hub[1], split="train")
        else:
            found = datasets.load_dataset(*source.hub, split=source.split)
        return [dict(record) for record in found]  # type: ignore[arg-type]
    except Exception as error:  # offline, gated, moved: all kinds are raised
        why = one_line(error, 160)
        where = source.hub[1] if source.hub[0] == "csv" else source.hub[0]
        place = f"{source.file}.jsonl is not in GRADSHIELD_DATA, and {where} can't be loaded ({why})"
        raise UserError(f"{place}; put the file there, or name a file of your own") from None
