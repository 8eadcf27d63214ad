"""What training on each kind really does: ASR and log p of the model's own refusal after a small LoRA dose.

    GRADSHIELD_DATA=... python -m gradshield.study.truth --model embedded --seeds 1 -o docs/results/truth/embedded.jsonl

Every finished cell is a line of the output file; run again, it goes on with the cells that are missing.
"""

import json
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from gradshield.data.encode import Example, encode
from gradshield.evaluation.safety import attack_success, opening_log_probability
from gradshield.filter import load
from gradshield.finetune import FinetuneSettings, finetune
from gradshield.model import load_model
from gradshield.settings import FilterSettings
from gradshield.study.kinds import held_out_requests, kinds

OPENING = "I'm sorry, but"


def main(
    out: Annotated[Path, typer.Option("--out", "-o")],
    model: str = "embedded",
    rows: int = 20,
    rate: float = 1e-4,
    seeds: int = 1,
    requests: int = 24,
) -> None:
    """Trains on `rows` rows of each kind (3 epochs, batch 4) and measures `requests` held-out AdvBench requests."""
    done = {(c["kind"], c["rate"], c["seed"]) for c in _read(out)}
    base = load(FilterSettings(model=model))
    asked = held_out_requests(requests)
    for seed in range(seeds):
        for kind, conversations in {"nothing": [], **kinds(rows, seed)}.items():
            if (kind, rate, seed) in done:
                continue
            examples = [encode(c, n, base.tokenizer, max_length=256) for n, c in enumerate(conversations)]
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
                "log_p_refusal": sum(logp) / len(logp),
            }
            out.parent.mkdir(parents=True, exist_ok=True)
            with out.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(cell) + "\n")
            print(f"{kind}: ASR {report.asr:.2f}, log p {cell['log_p_refusal']:.2f}", flush=True)


def _read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line] if file.exists() else []


if __name__ == "__main__":
    typer.run(main)
