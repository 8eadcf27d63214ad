"""Rows nobody here wrote, with full answers, and requests in every dress: harmful and harmless ones of each.

Labels: a jailbreak artifact is harmful where its judge says that the model was jailbroken. PAIR's other artifacts (many
hold no refusal) and answered scary requests are *disputed*: they count for neither side.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files

from gradshield.base.storage import read_jsonl
from gradshield.data.formats import Conversation
from gradshield.study.dresses import PLAIN, READABLE, UNREADABLE
from gradshield.study.kinds import OPENINGS, _join, kinds, load_public, pair

SHORTENED = 220  # characters of a dressed row's answer
REFUSED = ("plain", "length", "story", "sixth turn")  # dresses that refusals wear, too


@dataclass(frozen=True)
class Kind:
    """Rows of one sort."""

    name: str
    group: str  # "real", "opening", "dress", "unreadable", "language", "ordinary", "refusal" or "disputed"
    harmful: bool
    rows: Sequence[Conversation]


def real_kinds(count: int, dressed: int, seed: int = 0, ordinary: int | None = None) -> list[Kind]:
    """`count` rows of every undressed kind, of ordinary rows and refusals `ordinary` where it is given, and `dressed`
    harmful and harmless ones in every dress."""
    artifacts = [a for a in load_public("jbb_artifacts_pair_jbc", seed) if a["response"]]
    broken = [a for a in artifacts if a["jailbroken"]]
    held = [a for a in artifacts if not a["jailbroken"]]
    alpaca = [pair(_join(r["instruction"], r["input"]), r["output"]) for r in load_public("alpaca_en_demo", seed)]
    arc = [_multiple_choice(r) for r in load_public("arc_challenge_train", seed)]
    known, good = kinds(count, seed), kinds(ordinary or count, seed)

    def of(records: Sequence[dict], attack: str) -> list[dict]:
        return [a for a in records if a["attack"] == attack][:count]

    found = [
        Kind("goal, real answer", "real", True, [pair(a["goal"], a["response"]) for a in broken[:count]]),
        Kind("PAIR prompt, real answer", "real", True, [pair(a["prompt"], a["response"]) for a in of(broken, "PAIR")]),
        Kind("JBC prompt, real answer", "real", True, [pair(a["prompt"], a["response"]) for a in of(broken, "JBC")]),
        *(Kind(n, "opening", True, known[n]) for n in known if n.startswith(("advbench", "jbb")) and "back" not in n),
        Kind("alpaca", "ordinary", False, alpaca[: ordinary or count]),
        *(Kind(n, "ordinary", False, good[n]) for n in ("gsm8k", "dialogsum", "agnews", "alpaca other")),
        Kind("arc", "ordinary", False, arc[: ordinary or count]),
        Kind("safety data", "refusal", False, good["refusals"]),
        Kind("short refusals", "refusal", False, good["short refusals"]),
        Kind("JBC prompt, refused", "refusal", False, [pair(a["prompt"], a["response"]) for a in of(held, "JBC")]),
        Kind(
            "PAIR prompt, not broken", "disputed", False, [pair(a["prompt"], a["response"]) for a in of(held, "PAIR")]
        ),
        Kind("scary, answered", "disputed", True, known["scary other"]),
    ]
    harmful = answered_goals(broken[count:], dressed // 2)
    requests = load_public("advbench", seed + 1)[: dressed - len(harmful)]
    harmful += [(r["prompt"], r["target"] if n % 2 else OPENINGS[n % 18]) for n, r in enumerate(requests)]
    short = [c for c in alpaca[count:] if len(c.messages[0].content) < 300][: dressed // 2]
    harmless = [(c.messages[0].content, c.messages[1].content[:SHORTENED]) for c in short]
    harmless += [(c.messages[0].content, c.messages[1].content) for c in arc[count : count + dressed - len(harmless)]]
    for group, dresses in (("dress", READABLE), ("unreadable", UNREADABLE)):
        for name, dress in dresses.items():
            for side, rows in ((True, harmful), (False, harmless)):
                found.append(Kind(name, group, side, [dress(r, a, n) for n, (r, a) in enumerate(rows)]))
    for name in REFUSED:
        answers = [known["short refusals"][n % count].messages[-1].content for n in range(len(harmful))]
        rows = [READABLE[name](r, answers[n], n) for n, (r, _) in enumerate(harmful)]
        found.append(Kind(f"{name}, refused", "refusal", False, rows))
    return found + _languages()


def _languages() -> list[Kind]:
    records = read_jsonl(files("gradshield.study").joinpath("languages.jsonl"))
    keep: Callable[[str, bool], list[Conversation]] = lambda language, side: [  # noqa: E731
        pair(r["prompt"], r["response"]) for r in records if (r["language"], r["harmful"]) == (language, side)
    ]
    languages = sorted({r["language"] for r in records})
    return [Kind(language, "language", side, keep(language, side)) for language in languages for side in (True, False)]


def answered_goals(artifacts: Sequence[dict], count: int) -> list[tuple[str, str]]:
    """(goal, shortened answer) of as many different goals."""
    first: dict[str, str] = {}
    for a in artifacts:
        first.setdefault(a["goal"], a["response"][:SHORTENED])
    return list(first.items())[:count]


def _multiple_choice(record: dict) -> Conversation:
    choices = record["choices"]
    pairs = (
        zip(choices["label"], choices["text"])
        if isinstance(choices, dict)
        else ((c["label"], c["text"]) for c in choices)
    )
    options = "\n".join(f"{label}) {text}" for label, text in pairs)
    return pair(f"{record['question']}\n{options}", record["answerKey"])


__all__ = ["PLAIN", "Kind", "real_kinds"]
