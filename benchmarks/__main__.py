"""`python -m benchmarks run | gpu | lengths | levers | llamacpp | report`."""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.lengths import run as run_lengths
from benchmarks.levers import run as run_levers
from benchmarks.llamacpp import run as run_llamacpp
from benchmarks.models import label
from benchmarks.plan import FULL, GPU, QUICK
from benchmarks.plan import run as run_plan
from benchmarks.report import write_report
from gradshield.base.errors import UserError

RESULTS = Path(__file__).parent.parent / "docs" / "results" / "performance"
app = typer.Typer(add_completion=False, no_args_is_help=True)
Out = Annotated[Path, typer.Option("--out", "-o", help="folder of the measurements (*.jsonl)")]
Only = Annotated[list[str] | None, typer.Option("--method", help="measure only these methods (repeatable)")]


@app.command()
def run(
    model: Annotated[str, typer.Option(help='"embedded", a model\'s folder, or LAYERSxWIDTH')] = "embedded",
    out: Out = RESULTS,
    quick: Annotated[bool, typer.Option(help="a smoke check of minutes, into a temporary folder")] = False,
    longest: Annotated[int, typer.Option(help="tokens of the chats; LoRA on eight of 1,024 takes 16 GB")] = 1024,
    method: Only = None,
) -> None:
    """Makes the measurements that are not there yet, then docs/performance.md from all of them."""
    folder = Path(tempfile.mkdtemp()) if quick and out == RESULTS else out
    plan = replace(QUICK if quick else FULL, longest=longest)
    run_plan(model, folder / f"{label(model)}.jsonl", plan, only=method or ())
    report(folder)


@app.command()
def gpu(
    model: Annotated[
        str, typer.Option(help="a shape to fill with random weights, or a model's folder")
    ] = "llama-3.1-8b",
    out: Out = RESULTS,
    device: str = "cuda",
    dtype: str = "bfloat16",
    quick: bool = False,
    method: Only = None,
) -> None:
    """The same on a GPU: random weights in the shape of Llama-3.1-8B, bfloat16."""
    plan = QUICK if quick else GPU
    run_plan(model, out / f"gpu-{label(model)}.jsonl", plan, device=device, dtype=dtype, only=method or ())
    report(out)


@app.command()
def lengths(
    model: Annotated[str, typer.Option(help='"embedded", or a model\'s folder')] = "embedded",
    out: Out = RESULTS.parent / "lengths",
    method: Only = None,
) -> None:
    """Every method at its own best batch size, over rows of 32, 128, 512 and 1,024 tokens."""
    run_lengths(model, out / f"{label(model)}.jsonl", method or ())


@app.command()
def levers(
    model: Annotated[str, typer.Option(help='"embedded", or a model\'s folder')] = "embedded",
    out: Out = RESULTS.parent / "levers",
    longest: Annotated[int, typer.Option(help="tokens of the chat")] = 256,
) -> None:
    """What each way to make scoring cheaper is worth."""
    run_levers(model, out / f"{label(model)}.jsonl", longest)


@app.command()
def llamacpp(
    out: Out = RESULTS.parent / "llamacpp",
    longest: Annotated[int, typer.Option(help="tokens of the chats")] = 512,
) -> None:
    """FIHS by two passes of llama.cpp, against the exact score (needs llama-cpp-python)."""
    run_llamacpp(out / "embedded.jsonl", longest)


@app.command()
def report(out: Out = RESULTS) -> None:
    """Makes performance.md and its picture again from the measurements."""
    page = out.parent.parent / "performance.md" if out == RESULTS else out / "performance.md"
    write_report(out, page)
    print(page.read_text(encoding="utf-8"))


if __name__ == "__main__":
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
