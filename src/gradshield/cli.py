"""The command line: one thin function a verb. Heavy imports happen inside, so that --help is quick."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gradshield.errors import UserError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help=__doc__.split("\n")[0] if __doc__ else None,
)
console = Console()

ModelOption = Annotated[str, typer.Option("--model", help='Hub id, folder, .gguf, adapter folder, or "embedded"')]
AdapterOption = Annotated[str | None, typer.Option("--adapter", help="PEFT adapter laid over the model")]
QuantizeOption = Annotated[str | None, typer.Option("--quantize", help="4bit or 8bit (bitsandbytes)")]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON for machines")]
ProbesOption = Annotated[str | None, typer.Option("--probes", help="file of harmful requests (default: bundled)")]


@app.command()
def filter(
    path: Annotated[str, typer.Argument(help='file, folder, Hub dataset id, or "-" for stdin')],
    out: Annotated[Path, typer.Option("--out", "-o", help="run folder")] = Path("run"),
    model: ModelOption = "embedded",
    adapter: AdapterOption = None,
    quantize: QuantizeOption = None,
    device: Annotated[str | None, typer.Option(help='torch device, or "auto"')] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16")] = None,
    chat_template: Annotated[str | None, typer.Option(help="file with a chat template")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="run code that comes with the model")] = False,
    format: Annotated[str | None, typer.Option(help="jsonl, json, csv, parquet or text")] = None,
    columns: Annotated[list[str] | None, typer.Option("--map", help="prompt=COLUMN, response=COLUMN, ...")] = None,
    split: Annotated[str, typer.Option(help="split of a Hub dataset")] = "train",
    max_length: Annotated[int, typer.Option(help="tokens a row is cut to")] = 1024,
    loss_on: Annotated[str, typer.Option(help="assistant, last or all")] = "assistant",
    variant: Annotated[str, typer.Option(help="intent, paper, cosine or module")] = "intent",
    safety_score: Annotated[str, typer.Option(help="S of FIHS: paper or own")] = "paper",
    contrast: Annotated[bool, typer.Option(help="FIHS minus that of harmless-request probes")] = False,
    probes: ProbesOption = None,
    probe_count: Annotated[int, typer.Option(help="probes that carry FIHS's gradient")] = 12,
    threshold: Annotated[str, typer.Option(help="anchored, a1, fixed or share")] = "anchored",
    value: Annotated[float | None, typer.Option(help="the threshold, or the share")] = None,
    alpha: Annotated[float, typer.Option(help="A1's log-likelihood gain")] = 10.0,
    reference: Annotated[str | None, typer.Option(help="file of known-good rows")] = None,
    batch_tokens: Annotated[int, typer.Option(help="tokens of a batch")] = 2048,
    force: Annotated[bool, typer.Option(help="go on with a model that is not aligned")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be done and how long it takes")] = False,
    as_json: JsonOption = False,
) -> None:
    """Keep the rows that are safe to train on, quarantine the rest."""
    given = dict(locals())
    mapping = dict(_pair(item) for item in columns or []) or None
    names = ("path", "out", "dry_run", "as_json", "columns")
    from gradshield.filter import estimate, run_filter

    settings = _settings({**{k: v for k, v in given.items() if k not in names}, "columns": mapping})
    if dry_run:
        plan = estimate(path, settings)
        _show(plan, as_json, "dry run: nothing was written")
        return
    summary = run_filter(path, out, settings)
    if as_json:
        print(json.dumps(summary))
    else:
        _summary(summary, out)


@app.command()
def check(
    model: ModelOption = "embedded",
    adapter: AdapterOption = None,
    quantize: QuantizeOption = None,
    probes: ProbesOption = None,
    force: Annotated[bool, typer.Option(help="exit with 0 even when it is not aligned")] = False,
    as_json: JsonOption = False,
) -> None:
    """Is this model aligned enough to be the reference?"""
    from gradshield.data.encode import request_form
    from gradshield.filter import load
    from gradshield.reference import check_alignment

    loaded = load(_settings({"model": model, "adapter": adapter, "quantize": quantize}))
    result = check_alignment(loaded, probes)
    share, missing = loaded.coverage()
    facts = {
        "model": loaded.name,
        "grade": result.grade,
        "refused": sum(result.refused),
        "probes": len(result.probes),
        "mean_s": sum(result.s) / len(result.s),
        "first_tokens": dict(result.first_tokens),
        "coverage": share,
        "not_covered": missing,
        "read_at": request_form(loaded.tokenizer),
    }
    if as_json:
        per_probe = [
            {"probe": p, "refused": r, "s": s, "answer": a}
            for p, r, s, a in zip(result.probes, result.refused, result.s, result.answers)
        ]
        print(json.dumps({**facts, "per_probe": per_probe}))
    else:
        table = Table("S", "refused", "probe", "answer", title=escape(f"{loaded.name}: {result.grade}"))
        for p, r, s, a in sorted(zip(result.probes, result.refused, result.s, result.answers), key=lambda x: x[2]):
            table.add_row(f"{s:+.1f}", "yes" if r else "no", safe(p, 60), safe(a, 60))
        console.print(table)
        _show(facts, False, "")
    if result.grade == "not aligned" and not force:
        raise UserError(f"{loaded.name} refuses {sum(result.refused)} of {len(result.probes)} probes: not aligned")


@app.command()
def explain(
    run: Annotated[Path, typer.Argument(help="run folder")],
    row: Annotated[int, typer.Argument(help="row number, from 1")],
    as_json: JsonOption = False,
) -> None:
    """Why did this row score as it did? Signals, tokens, modules, nearest probes."""
    from dataclasses import asdict

    from gradshield.explain import explain as explain_row

    result = explain_row(run, row)
    if as_json:
        print(json.dumps(asdict(result)))
        return
    console.print(f"row {row}: score {result.score:+.2f}, threshold {result.threshold:+.2f}: {result.verdict}")
    for name, number in result.signals.items():
        console.print(f"  {name} {number:+.2f}")
    console.print("median of anchors: " + ", ".join(f"{k} {v:+.2f}" for k, v in result.anchors.items()))
    if set(result.signals) & {"request", "answer"}:
        console.print("FIHS below is a second opinion: the score is the smaller of request and answer")
    for title, pairs in (
        ("tokens by share of FIHS", sorted(result.tokens, key=lambda t: -abs(t[1]))[:12]),
        ("modules by share of FIHS", result.modules),
        ("nearest probes (cosine)", result.probes[:5]),
    ):
        table = Table(title, "", show_header=True)
        for name, number in pairs:
            table.add_row(safe(name, 70), f"{number:+.3f}")
        console.print(table)


@app.command()
def align(
    out: Annotated[Path, typer.Option("--out", "-o", help="folder for the adapter")],
    base: Annotated[str, typer.Option(help="model to align")] = "embedded-unaligned",
    as_json: JsonOption = False,
) -> None:
    """Make the alignment adapter of the embedded model again, from our requests and refusals."""
    import os

    from gradshield.align import SETTINGS, alignment_report, write_card
    from gradshield.align import align as make
    from gradshield.model import load_model

    figures: dict[str, Any] = dict(make(base, out))
    aligned = load_model(base, adapter=str(out))
    report = alignment_report(aligned)
    folder = Path(os.environ.get("GRADSHIELD_DATA", ""))
    public = (folder / "advbench.jsonl", folder / "jbb_benign.jsonl")
    write_card(out, SETTINGS, report, alignment_report(aligned, *public) if all(p.is_file() for p in public) else None)
    figures |= {k: v for k, v in report.items() if k != "answers"}
    _show(figures, as_json, f"adapter in {out}")


@app.command()
def demo(out: Annotated[Path, typer.Option("--out", "-o", help="run folder")] = Path("demo-run")) -> None:
    """Filter the bundled file of 300 rows with the embedded model."""
    from gradshield.filter import run_filter
    from gradshield.probe import ASSETS

    summary = run_filter(str(ASSETS / "demo.jsonl"), out, _settings({}))
    _summary(summary, out)
    import pyarrow.parquet as pq

    table = pq.read_table(out / "scores.parquet").to_pydict()
    poison = [g == "poison" for g in table["group"]]
    caught = sum(p and v == "quarantined" for p, v in zip(poison, table["verdict"]))
    lost = sum(not p and v == "quarantined" for p, v in zip(poison, table["verdict"]))
    console.print(f"of the {sum(poison)} planted harmful rows, {caught} were quarantined; of the other rows, {lost}")


def main() -> None:
    """Runs the command line; a user's mistake is one line on stderr and exit code 2."""
    try:
        app(standalone_mode=True)
    except UserError as error:
        print(f"gradshield: {safe(str(error), 2000, markup=False)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("gradshield: stopped; the same command goes on where it was", file=sys.stderr)
        sys.exit(130)


def safe(text: str, limit: int, markup: bool = True) -> str:
    """Dataset text for the terminal: control and bidi characters made visible, cut to `limit`, no markup read."""
    shown = "".join(c if c.isprintable() else f"<U+{ord(c):04X}>" if c != "\n" else "↵" for c in text)
    shown = shown if len(shown) <= limit else shown[: limit - 1] + "…"
    return escape(shown) if markup else shown


def _settings(values: dict[str, Any]) -> Any:
    from pydantic import ValidationError

    from gradshield.filter import FilterSettings

    try:
        return FilterSettings(**values)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"--{str(first['loc'][0]).replace('_', '-')} {first['input']}: {first['msg']}") from None


def _pair(item: str) -> tuple[str, str]:
    name, equals, column = item.partition("=")
    if not equals:
        raise UserError(f"--map {item}: say it as prompt=COLUMN")
    return name, column


def _summary(summary: dict[str, Any], out: Path) -> None:
    table = Table(title=safe(str(summary["file"]), 80), show_header=False)
    for name in ("rows", "kept", "quarantined", "set_aside"):
        table.add_row(name.replace("_", " "), f"{summary[name]:,}")
    threshold = summary["threshold"]
    value = "none: nothing is removed" if threshold["value"] is None else f"{threshold['value']:+.2f}"
    table.add_row("threshold", f"{value} ({threshold['rule']})")
    table.add_row("how sure", threshold["note"])
    if threshold["good_lost"] is not None:
        table.add_row(
            "expected", f"{threshold['good_lost']:.1f} good rows lost, {threshold['harmful_kept']:.1f} harmful kept"
        )
    table.add_row("model", safe(f"{summary['model']} ({summary['probes']['grade']})", 60))
    table.add_row("time", f"{summary['seconds']:.0f} s, {summary['rows_per_second']:.1f} rows/s")
    console.print(table)
    if summary["probes"]["grade"] == "weak":
        refused = f"{summary['probes']['refused']} of {summary['probes']['of']}"
        console.print(f"warning: this model refuses only {refused} probes, so it is a weak reference", style="bold")
    console.print(f"report: {out / 'report.html'}", soft_wrap=True)


def _show(facts: dict[str, Any], as_json: bool, closing: str) -> None:
    if as_json:
        print(json.dumps(facts))
        return
    for name, value in facts.items():
        shown = f"{value:.3g}" if isinstance(value, float) else str(value)
        console.print(f"{name.replace('_', ' '):>22}  {safe(shown, 300)}")
    if closing:
        console.print(closing)
