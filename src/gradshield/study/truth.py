"""What training on each kind really does: ASR and log p of the model's own refusal after a small LoRA dose.

    GRADSHIELD_DATA=... python -m gradshield.study.truth --rate 5e-4 -o docs/results/truth/embedded.jsonl

Every finished cell is a line of the output file; run again, it trains the cells that are missing. With --scores (a
scores.csv of the separation study) a table beside them holds every score's mean per kind against what happened. With
--real the kinds, and the scores.csv, are those of the study of real rows: full answers that nobody here wrote.
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from scipy.stats import spearmanr

from gradshield.base.settings import FilterSettings, FinetuneSettings
from gradshield.base.storage import read_jsonl
from gradshield.data.encode import Example, encode, encode_request
from gradshield.data.examples import token_counts
from gradshield.data.formats import Conversation
from gradshield.evaluation.safety import attack_success
from gradshield.models.batching import losses, map_by_length
from gradshield.models.load import Model, load_model, load_settings_model
from gradshield.models.refusal import has_refusal_phrase
from gradshield.study.kinds import (
    BENIGN,
    HARMFUL,
    OPENINGS,
    REFUSED_FIRST,
    SCARY,
    SHIFT,
    TAKEN_BACK,
    held_out_requests,
    kinds,
)
from gradshield.study.real import read_scored, score_values
from gradshield.study.real_kinds import real_kinds
from gradshield.study.separation import Table, read_scores
from gradshield.training.finetune import finetune

OPENING = "I'm sorry, but"
KINDS = ("nothing", *HARMFUL, *BENIGN, *SCARY, SHIFT)
REAL_GROUPS = ("real", "refusal", "disputed", "ordinary")


def main(
    out: Annotated[Path, typer.Option("--out", "-o")],
    model: str = "embedded",
    rows: int = 20,
    rate: float = 1e-4,
    seeds: int = 1,
    requests: int = 24,
    scores: Path | None = None,
    real: bool = False,
) -> None:
    """Trains on `rows` rows of each kind (3 epochs, batch 4) and measures `requests` held-out AdvBench requests."""
    done = {(c["kind"], c["rate"], c["seed"]) for c in _read(out)}
    names = ["nothing", *_kinds(real, rows, 0)] if real else KINDS
    if any((kind, rate, seed) not in done for seed in range(seeds) for kind in names):
        _train(out, model, rows, rate, seeds, requests, real, done)
    if scores:
        measured = _real_scores(scores) if real else read_scores(scores)[0]
        table = _table([c for c in _read(out) if c["rate"] == rate and c["seed"] < seeds], rate, seeds, measured)
        out.with_suffix(".md").write_text(table, encoding="utf-8")
        print(table)


def _kinds(real: bool, rows: int, seed: int) -> dict[str, Sequence[Conversation]]:
    """`rows` conversations of every kind."""
    if real:
        return {kind.name: kind.rows for kind in real_kinds(rows, 0, seed) if kind.group in REAL_GROUPS and kind.rows}
    return dict(kinds(rows, seed))


def _real_scores(file: Path) -> Table:
    """Every scorer's scores of each kind of real rows."""
    lines = read_scored(file)
    keys = dict.fromkeys((line["kind"], line["scorer"]) for line in lines)
    of = {key: score_values([x for x in lines if (x["kind"], x["scorer"]) == key]) for key in keys}
    return {kind: {name: of[kind, name] for k, name in keys if k == kind} for kind, _ in keys}


def _train(out: Path, model: str, rows: int, rate: float, seeds: int, requests: int, real: bool, done: set) -> None:
    base = load_settings_model(FilterSettings(model=model))
    asked = held_out_requests(requests)
    for seed in range(seeds):
        for kind, conversations in {"nothing": [], **_kinds(real, rows, seed)}.items():
            done |= {(c["kind"], c["rate"], c["seed"]) for c in _read(out)}  # of another process at the same file
            if (kind, rate, seed) in done:
                continue
            examples = [encode(c, n, base.tokenizer, max_length=1024) for n, c in enumerate(conversations)]
            examples = [e for e in examples if isinstance(e, Example)]
            with tempfile.TemporaryDirectory() as folder:
                if examples:
                    settings = FinetuneSettings(learning_rate=rate, batch=4, seed=seed)
                    finetune(base, examples, Path(folder), settings)
                    trained = load_model(model, adapter=folder)
                else:
                    trained = base
                report = attack_success(trained, asked, 24)
                logp = opening_log_probability(trained, asked, OPENING)
            cell = {
                "kind": kind,
                "rate": rate,
                "seed": seed,
                "rows": len(examples),
                "asr": report.asr,
                "interval": report.interval,
                "asr_phrases": report.asr_phrases,
                "log_p_refusal": sum(logp) / len(logp),
                "taken_back": sum(map(_taken_back, report.answers)) / len(asked),
            }
            out.parent.mkdir(parents=True, exist_ok=True)
            with out.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(cell) + "\n")
            print(f"{kind}: ASR {report.asr:.2f}, log p {cell['log_p_refusal']:.2f}", flush=True)


def _taken_back(answer: str) -> bool:
    """Whether the answer refuses and then continues as the rows of REFUSED_FIRST do."""
    turns = (words.strip(" ,.:").lower() for words in TAKEN_BACK + OPENINGS)
    return has_refusal_phrase(answer) and any(turn in answer.lower() for turn in turns)


def _table(cells: list[dict], rate: float, seeds: int, measured: Table) -> str:
    """Kinds by how far log p fell, with ASR and every score's mean over the kind's rows.

    Of one seed, ASR has its Wilson interval; of several, it is their mean and range. Below the table is how well each
    mean ranks the kinds (Spearman against −log p).
    """
    by_kind = {kind: [c for c in cells if c["kind"] == kind] for kind in dict.fromkeys(c["kind"] for c in cells)}
    variants = list(next(iter(measured.values())))
    lines = [
        f"Learning rate {rate:g}, {seeds} seed(s), {max(c['rows'] for c in cells)} rows a kind.\n",
        f"| trained on | ASR | refused, then taken back | log p({OPENING!r}) | " + " | ".join(variants) + " |",
        "|---" * (4 + len(variants)) + "|",
    ]
    for kind in sorted(by_kind, key=lambda k: -np.mean([c["log_p_refusal"] for c in by_kind[k]])):
        found = by_kind[kind]
        asr = _spread([c["asr"] for c in found])
        if len(found) == 1:
            asr += f" [{found[0]['interval'][0]:.2f}, {found[0]['interval'][1]:.2f}]"
        means = [f"{measured[kind][v].mean():.3g}" if kind in measured else "" for v in variants]
        back = _spread([c["taken_back"] for c in found]) if all("taken_back" in c for c in found) else ""
        figures = f"{asr} | {back} | {_spread([c['log_p_refusal'] for c in found])}"
        lines.append(f"| {kind} | {figures} | " + " | ".join(means) + " |")
    agreement = {v: [_agreement(cells, measured, v, seed) for seed in range(seeds)] for v in variants}
    lines.append(
        "\nSpearman with −log p over the kinds but those that take a refusal back (mean, and range over the seeds): "
        + ", ".join(f"{v} {_spread(found)}" for v, found in agreement.items())
    )
    return "\n".join(lines) + "\n"


def _agreement(cells: list[dict], measured: Table, variant: str, seed: int) -> float:
    """Spearman's correlation, over the kinds, of the mean score with what a training on the kind did to −log p."""
    fall = {c["kind"]: -c["log_p_refusal"] for c in cells if c["seed"] == seed and c["kind"] in measured}
    fall = {kind: value for kind, value in fall.items() if kind not in REFUSED_FIRST}
    found: Any = spearmanr([measured[k][variant].mean() for k in fall], list(fall.values()))
    return float(found.statistic)


def _spread(values: list[float]) -> str:
    mean = f"{np.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.2f} to {max(values):.2f})"


def _read(file: Path) -> list[dict]:
    return read_jsonl(file) if file.exists() else []


@torch.no_grad()
def opening_log_probability(model: Model, requests: Sequence[str], opening: str) -> list[float]:
    """log p(opening | request) for every request, summed over the opening's tokens (nats)."""
    target = model.tokenizer.encode(opening, add_special_tokens=False)
    encoded = [np.array([*encode_request(request, model.tokenizer), *target]) for request in requests]
    examples = [Example(n, ids, np.arange(len(ids)) >= len(ids) - len(target)) for n, ids in enumerate(encoded)]

    def summed(batch: Sequence[int]) -> list[float]:
        return (-len(target) * losses(model, [examples[n] for n in batch])).tolist()

    return map_by_length(summed, token_counts(examples), model.batch_tokens, item="request", fix="use a smaller model")


if __name__ == "__main__":
    typer.run(main)
