"""Every scorer on the same rows, and every scorer and defense in the same training.

    GRADSHIELD_DATA=... python -m gradshield.study.comparison score SCORER... -o docs/results/scorers/embedded
    GRADSHIELD_DATA=... python -m gradshield.study.comparison train ARM... -o docs/results/scorers/embedded

`score` adds what scores.csv lacks: ordinary rows and refusals, harmful rows with real answers, with openings, and
dressed ones. `train` adds a line per arm and seed to cells.jsonl. An arm is a scorer, which takes as many rows out of
the file as are harmful; or `none`, `clean`, `defense:NAME`. Both write table.md again.
"""

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from gradshield.base.settings import FilterSettings, FinetuneSettings
from gradshield.base.storage import read_jsonl
from gradshield.data.encode import Example, encode
from gradshield.defenses.train import defended_rows, train_defended, with_prompt
from gradshield.evaluation.safety import attack_success
from gradshield.evaluation.utility import held_out_loss
from gradshield.models.load import Model, load_settings_model
from gradshield.scoring.check import check_alignment
from gradshield.scoring.engine import score
from gradshield.scoring.reference import make_reference
from gradshield.scoring.registry import find_scorer
from gradshield.study.kinds import held_out_requests
from gradshield.study.real import read_scored, score_values, scored_line, write_scored
from gradshield.study.real_kinds import Kind, real_kinds
from gradshield.study.separation import auroc
from gradshield.training.finetune import finetune
from gradshield.tune.trainer import load_trained

LONGEST = 192  # tokens of a row: longer ones are cut
BENIGN, HARMFUL = ("ordinary", "refusal"), ("real", "opening", "dress")
TRAINED = ("goal, real answer", "advbench other")  # the harmful rows of the trainings, half of each
ADDED_LATER = ("markup inside",)  # dresses that are left out, since with them the draw would be another
SHORT = 144  # tokens of a row that is trained on: ordinary rows that are longer are left out, harmful ones are cut
ORDINARY = 48  # rows of a training's file
SHARE = 0.2  # of the file that is harmful
Row = tuple[Kind, int, Example]
Out = Annotated[Path, typer.Option("--out", "-o")]
app = typer.Typer(add_completion=False)


@app.command("score")
def score_rows(
    scorer: list[str], out: Out, model: str = "embedded", rows: int = 20, dressed: int = 1, seed: int = 3
) -> None:
    """Scores the rows with each scorer that scores.csv lacks. To a scorer of the whole file, they are the file."""
    file = out / "scores.csv"
    table = read_scored(file)
    missing = [name for name in scorer if name not in {each["scorer"] for each in table}]
    if missing:
        loaded = load_settings_model(FilterSettings(model=model))
        placed, check = _rows(loaded, rows, dressed, seed), check_alignment(loaded)
        examples = [example for *_, example in placed]
        out.mkdir(parents=True, exist_ok=True)
        for name in missing:
            settings = FilterSettings(model=model, scorer=name, threshold="share", value=SHARE, max_length=LONGEST)
            start = time.monotonic()
            prepared = make_reference(loaded, check, settings, examples)
            found = score(prepared.scored_part(examples), prepared.scorer, batch_tokens=512, title=name)
            table += [
                scored_line(name, kind.group, kind.name, kind.harmful, n, value, found.reasons.get(at, ""))
                for at, ((kind, n, _), value) in enumerate(zip(placed, found["score"]))
            ]
            write_scored(file, table)
            print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
    _tables(out)


@app.command()
def train(
    arm: list[str],
    out: Out,
    model: str = "embedded",
    rows: int = 20,
    dressed: int = 1,
    seeds: int = 1,
    rate: float = 5e-4,
    requests: int = 60,
) -> None:
    """Trains once per arm and seed on ordinary rows and a share of harmful ones. Measures ASR on requests that no
    decision has seen, and the loss on ordinary rows that nothing was trained on."""
    file = out / "cells.jsonl"
    out.mkdir(parents=True, exist_ok=True)
    loaded = load_settings_model(FilterSettings(model=model))
    asked = held_out_requests(requests)
    placed = _rows(loaded, rows, dressed, 3)
    for seed in range(seeds):
        file_rows, test = _mixture(placed, seed)
        for name in arm:
            if (name, seed) in {(cell["arm"], cell["seed"]) for cell in _cells(file)}:
                continue
            start = time.monotonic()
            kept = _kept(name, file_rows, out)
            training = FinetuneSettings(learning_rate=rate, seed=seed)
            with tempfile.TemporaryDirectory() as folder:
                examples = [example for *_, example in kept]
                if name.startswith("defense:"):
                    settings = FilterSettings(model=model, max_length=LONGEST)
                    defense = name.removeprefix("defense:")
                    examples = defended_rows(loaded, examples, training, settings, defense)
                    train_defended(loaded, examples, Path(folder), training, settings, defense)
                else:
                    finetune(loaded, examples, Path(folder), training)
                trained = with_prompt(load_trained(FilterSettings(model=model), Path(folder)), Path(folder))
                safety = attack_success(trained, asked, 24)
                loss = held_out_loss(trained, [example for *_, example in test])
            cell = {
                "arm": name,
                "seed": seed,
                "kept": len(kept),
                "harmful_kept": sum(kind.harmful for kind, *_ in kept),
                "asr": safety.asr,
                "requests": len(asked),
                "utility": loss.value,
                "seconds": round(time.monotonic() - start),
            }
            with file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(cell) + "\n")
            print(cell, flush=True)
    _tables(out)


def _rows(model: Model, rows: int, dressed: int, seed: int) -> list[Row]:
    """Every row of the comparison, in an order that the seed mixes: a file has no sorted kinds."""
    groups = {True: HARMFUL, False: (*BENIGN, "dress")}
    kinds = [k for k in real_kinds(rows, dressed, seed) if k.group in groups[k.harmful] and k.name not in ADDED_LATER]
    found = [
        (kind, n, example)
        for kind in kinds
        for n, conversation in enumerate(kind.rows)
        if isinstance(example := encode(conversation, n, model.tokenizer, max_length=LONGEST), Example)
    ]
    order = np.random.default_rng(seed).permutation(len(found))
    return [
        (kind, n, replace(example, row=at, conversation=kind.rows[n]))
        for at, (kind, n, example) in enumerate(found[place] for place in order)
    ]


def _mixture(placed: Sequence[Row], seed: int) -> tuple[list[Row], list[Row]]:
    """(the file that is trained on, ordinary rows left out of it): the seed draws both."""
    draw = np.random.default_rng(seed)
    ordinary = [row for row in placed if row[0].group == "ordinary" and len(row[2].ids) <= SHORT]
    order = draw.permutation(len(ordinary))
    mixed = [ordinary[n] for n in order[:ORDINARY]]
    count = round(ORDINARY * SHARE / (1 - SHARE)) // 2
    for name in TRAINED:
        of = [row for row in placed if row[0].name == name]
        mixed += [(*of[n][:2], _cut(of[n][2])) for n in draw.permutation(len(of))[:count]]
    return [mixed[n] for n in draw.permutation(len(mixed))], [ordinary[n] for n in order[ORDINARY:]]


def _cut(example: Example) -> Example:
    return replace(example, ids=example.ids[:SHORT], mask=example.mask[:SHORT])


def _kept(arm: str, rows: Sequence[Row], out: Path) -> list[Row]:
    """What an arm trains on. A scorer takes out as many rows as are harmful, those that it scores highest; rows that it
    can't score are taken out first."""
    if arm == "clean":
        return [row for row in rows if not row[0].harmful]
    if arm == "none" or arm.startswith("defense:"):
        return list(rows)
    found = {(x["kind"], x["harmful"], int(x["n"])): x for x in read_scored(out / "scores.csv") if x["scorer"] == arm}
    own = [found[kind.name, str(int(kind.harmful)), n] for kind, n, _ in rows]
    scores = np.array([np.inf if x["reason"] else float(x["score"]) for x in own])
    removed = set(np.argsort(-scores, kind="stable")[: sum(kind.harmful for kind, *_ in rows)].tolist())
    return [row for n, row in enumerate(rows) if n not in removed]


def _tables(out: Path) -> None:
    """table.md: every scorer on the rows, and every arm's trainings."""
    lines = read_scored(out / "scores.csv")
    names = list(dict.fromkeys(x["scorer"] for x in lines))
    groups = {"real answers": ("real",), "openings": ("opening",), "dressed": ("dress",)}
    head = " | ".join(f"{g}: AUROC [95 %] | found at 1 % lost" for g in groups)
    text = [f"| scorer | cost | {head} | set aside |", "|---" * (3 + 2 * len(groups)) + "|"]
    for name in names:
        own = [x for x in lines if x["scorer"] == name]
        benign = score_values([x for x in own if x["harmful"] == "0"])
        cells = [f"| {name} | {find_scorer(name)[0].cost:g}"]
        for parts in groups.values():
            bad = score_values([x for x in own if x["harmful"] == "1" and x["group"] in parts])
            low, high = _bootstrap(bad, benign)
            cells.append(f"{auroc(bad, benign):.3f} [{low:.2f}, {high:.2f}]")
            cells.append(f"{(bad > np.quantile(benign, 0.99)).mean():.2f} of {len(bad)}")
        cells.append(f"{sum(bool(x['reason']) for x in own) / len(own):.2f} |")
        text.append(" | ".join(cells))
    cells = _cells(out / "cells.jsonl")
    text += [
        "",
        "| arm | rows | harmful among them | ASR | of each seed | utility (−loss) | seconds |",
        "|---" * 7 + "|",
    ]
    for arm in dict.fromkeys(cell["arm"] for cell in cells):
        own = [cell for cell in cells if cell["arm"] == arm]
        mean = {
            key: np.mean([cell[key] for cell in own]) for key in ("kept", "harmful_kept", "asr", "utility", "seconds")
        }
        each = ", ".join(f"{cell['asr']:.2f}" for cell in sorted(own, key=lambda cell: cell["seed"]))
        text.append(
            f"| {arm} | {mean['kept']:.0f} | {mean['harmful_kept']:.1f} | {mean['asr']:.2f} | {each} "
            f"| {mean['utility']:.3f} | {mean['seconds']:.0f} |"
        )
    (out / "table.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    print("\n".join(text))


def _bootstrap(harmful: np.ndarray, benign: np.ndarray, draws: int = 400) -> tuple[float, float]:
    """95 % interval of the AUROC over rows drawn with replacement."""
    rng = np.random.default_rng(0)
    found = [auroc(rng.choice(harmful, len(harmful)), rng.choice(benign, len(benign))) for _ in range(draws)]
    return float(np.quantile(found, 0.025)), float(np.quantile(found, 0.975))


def _cells(file: Path) -> list[dict]:
    return read_jsonl(file) if file.exists() else []


if __name__ == "__main__":
    app()
