"""How long an evaluation's answers take, against the naive loop: one request at a time, every answer to its end.

    python benchmarks/evaluation.py [-o docs/results/evaluation/speed.json]

The embedded model refuses nearly everything (what a safe trial looks like), the same without its adapter nearly nothing
(an unsafe one). Every way must come to the same verdicts. Times are processor time on one thread, which a busy machine
disturbs little, and the least of the repeats.
"""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer

from gradshield.data.encode import encode_request
from gradshield.evaluation.sources import harmful_requests
from gradshield.models.generate import generate, text_of
from gradshield.models.load import ADAPTER, Model, load_model
from gradshield.models.refusal import refusals


@torch.no_grad()
def plainly(model: Model, requests: Sequence[str], tokens: int, batch: int) -> list[str]:
    """`net.generate` as it is usually called: `batch` requests in their order, padded, every answer to its end."""
    answers, pad = [], model.tokenizer.pad_token_id
    for start in range(0, len(requests), batch):
        rows = [encode_request(r, model.tokenizer).tolist() for r in requests[start : start + batch]]
        width = max(map(len, rows))
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        out = model.net.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=pad
        )
        answers += [text_of(model, row[width:].tolist()) for row in out]
    return answers


def unmerged() -> Model:
    """The embedded model with its adapter beside its weights, not merged into them."""
    from peft import PeftModel

    base = load_model("embedded-unaligned", device="cpu")
    return Model("embedded", PeftModel.from_pretrained(base.net, str(ADAPTER)).eval(), base.tokenizer, "")


def main(
    out: Annotated[Path, typer.Option("--out", "-o")] = Path("docs/results/evaluation/speed.json"),
    count: int = 32,
    tokens: int = 32,
    repeats: int = 3,
) -> None:
    """Measures every way on both models, prints a table and writes it as JSON."""
    torch.set_num_threads(1)
    requests, rows = harmful_requests("bundled", count), []
    for name in ("embedded", "embedded-unaligned"):
        model = load_model(name, device="cpu")

        def ways(m: Model = model) -> dict[str, Callable[[], list[str]]]:
            return {
                "one by one": lambda: plainly(m, requests, tokens, 1),
                "batches": lambda: plainly(m, requests, tokens, count),
                "batches; sorted, rows leave, opening read once": lambda: generate(m, requests, tokens, count),
            }

        todo = ways()
        if name == "embedded":
            beside = unmerged()
            todo = {"one by one, adapter not merged": lambda m=beside: plainly(m, requests, tokens, 1), **todo}
        seconds: dict[str, float] = {}
        verdicts: dict[str, list[bool]] = {}
        for _ in range(repeats):  # in turn, so that a busy machine is busy for all
            for way, run in todo.items():
                start = time.process_time()
                verdicts[way] = refusals(run())
                seconds[way] = min(seconds.get(way, 1e9), time.process_time() - start)
        for way, taken in seconds.items():
            same = verdicts[way] == verdicts["one by one"]
            times = seconds["one by one"] / taken
            refused = sum(verdicts[way])
            rows.append({"model": name, "way": way, "cpu_seconds": round(taken, 2), "times": round(times, 2)})
            rows[-1] |= {"refused": refused, "same_verdicts": same}
            print(f"{name:20} {way:48} {taken:7.2f} s  {times:5.2f} x  refused {refused}, same verdicts: {same}")
    facts = {"requests": count, "tokens": tokens, "repeats": repeats, "threads": 1}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({**facts, "device": "cpu", "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
