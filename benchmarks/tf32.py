"""TF32 as a lever on a GPU: raw FIHS in float32 with and without it, beside per-example autograd without it.

GRADSHIELD_DATA=... python -m benchmarks.tf32 -o docs/results/levers/tf32-h200.jsonl
"""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.measure import run_once
from benchmarks.methods import make_task
from benchmarks.models import open_model
from benchmarks.rows import mixed


def main(out: Annotated[Path, typer.Option("--out", "-o")], model: str = "16x2048", device: str = "cuda") -> None:
    """Adds a line a method: the seconds of three runs, and the scores of the first."""
    task = make_task(open_model(model, device, "float32"), batch_tokens=8192)
    rows = mixed(task.model, 10, 8, 1024)
    for tf32 in (False, True):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        for name in ("forward", "paper", "intent") if tf32 else ("forward", "paper", "intent", "autograd"):
            found = [run_once(task, name, rows) for _ in range(3)]
            scores = None if found[0].scores is None else [float(f"{x:.9g}") for x in found[0].scores]
            cell = {"spec": model, "dtype": "float32", "tf32": tf32, "method": name}
            cell |= {"seconds": [each.seconds for each in found], "scores": scores}
            with out.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(cell) + "\n")
            print(name, tf32, cell["seconds"], flush=True)


if __name__ == "__main__":
    typer.run(main)
