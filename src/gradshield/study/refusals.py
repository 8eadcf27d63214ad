"""How often the refusal detector agrees with one reader of 350 answers, and the paper's phrases beside it.

    GRADSHIELD_DATA=... python -m gradshield.study.refusals --qwen FOLDER

Many answers are harmful, so only their hashes are kept with the labels, and the answers are made again: 40 tokens
of the embedded model with and without its adapter and of Qwen2.5-Coder-0.5B, 40 words of JailbreakBench's artifacts and
of Safety-Tuned LLaMAs. The detector is fitted on none of them.
"""

import hashlib
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Annotated

import typer

from gradshield.base.storage import read_jsonl
from gradshield.evaluation.safety import wilson
from gradshield.models.generate import generate
from gradshield.models.load import EMBEDDED, EMBEDDED_BASE, load_model
from gradshield.models.refusal import has_refusal_phrase, refusals
from gradshield.study.kinds import data_folder, load_public

LABELS = Path("docs/results/refusals/labels.jsonl")  # {"id", "answer_sha256", "label"}
AGREEMENT = Path("docs/results/refusals/agreement.md")
SETS = ("advbench", "jbb_harmful", "jbb_benign")
COUNTS = {"embedded": (20, 14, 16), "unaligned": (40, 28, 32), "qwen": (20, 15, 15)}  # requests of each set
SEED, TOKENS, WORDS = 18, 40, 40


def main(
    qwen: str = "Qwen/Qwen2.5-Coder-0.5B-Instruct",
    out: Annotated[Path, typer.Option("--out", "-o")] = AGREEMENT,
) -> None:
    """Writes the answers again and prints the table of agreement, which goes to `out`, too."""
    labels = {row["id"]: row for row in read_jsonl(LABELS)}
    names = {"embedded": EMBEDDED, "unaligned": EMBEDDED_BASE, "qwen": qwen}
    answers = {**dict(_artifacts()), **dict(_safety_only(labels))}
    for source, name in names.items():
        answers |= _own(source, name)
    same = {k: text for k, text in answers.items() if k in labels and fingerprint(text) == labels[k]["answer_sha256"]}
    table = agreement_table({key: (text, labels[key]["label"]) for key, text in same.items()})
    if len(same) < len(labels):
        table += f"\n{len(labels) - len(same)} answers came out differently on this machine and are left out.\n"
    out.write_text(table, encoding="utf-8")
    print(table)


def _own(source: str, name: str) -> dict[str, str]:
    """A model's greedy answers to the first requests of each set."""
    model = load_model(name)
    asked = [r for each, count in zip(SETS, COUNTS[source]) for r in load_public(each, SEED)[:count]]
    texts = generate(model, [r["prompt"] for r in asked], TOKENS, title=source)
    return {f"{source}/{r['id']}": text for r, text in zip(asked, texts)}


def _artifacts() -> Iterator[tuple[str, str]]:
    """Openings of real answers: 34 of PAIR and 26 of JBC that failed as jailbreaks, and 40 that did not."""
    rows = load_public("jbb_artifacts_pair_jbc", SEED)
    pair, jbc = ([r for r in rows if r["attack"] == a and not r["jailbroken"]] for a in ("PAIR", "JBC"))
    for r in [*pair[:34], *jbc[:26], *[r for r in rows if r["jailbroken"]][:40]]:
        yield f"artifacts/{r['attack']}-{r['target']}-{r['index']}", " ".join(r["response"].split()[:WORDS])


def _safety_only(labels: Collection[str]) -> Iterator[tuple[str, str]]:
    """Openings of the labelled answers of Safety-Tuned LLaMAs, named by their lines, from 0."""
    lines = read_jsonl(data_folder() / "safety_only_data.jsonl")
    for key in labels:
        source, _, number = key.partition("/")
        if source == "safety-only":
            yield key, " ".join(lines[int(number)]["output"].split()[:WORDS])


def fingerprint(answer: str) -> str:
    """The first 16 hex digits of the SHA-256 of an answer."""
    return hashlib.sha256(answer.encode()).hexdigest()[:16]


def agreement_table(labelled: dict[str, tuple[str, str]]) -> str:
    """Agreement with the labels by source, of id → (answer, label); "neither" counts as not refused."""
    lines = [
        "| answers of | answers | refused | agreement, 95 % interval | missed | wrongly taken for refusals "
        "| agreement of the phrases | missed | wrongly taken |",
        "|---" * 9 + "|",
    ]
    parts = {source: (source,) for source in (*COUNTS, "artifacts", "safety-only")}
    parts |= {"all but safety-only": (*COUNTS, "artifacts"), "all": (*parts,)}
    for source, prefixes in parts.items():
        part = [pair for key, pair in labelled.items() if key.partition("/")[0] in prefixes]
        if not part:
            continue
        texts, truth = [text for text, _ in part], [label == "refused" for _, label in part]
        cells = [source, str(len(part)), str(sum(truth))]
        for found in (refusals(texts), list(map(has_refusal_phrase, texts))):
            kinds = Counter(zip(truth, found))
            right = kinds[True, True] + kinds[False, False]
            low, high = wilson(right, len(part))
            cells.append(f"{right / len(part):.3f} [{low:.3f}, {high:.3f}]")
            cells += [str(kinds[True, False]), str(kinds[False, True])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
