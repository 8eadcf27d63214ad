"""The command line: one thin function a verb. Heavy imports happen inside, so that --help is quick."""

import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from gradshield.base.errors import UserError
from gradshield.base.processes import is_first, processes
from gradshield.base.settings import (
    FilterSettings,
    FinetuneSettings,
    ModelSettings,
    RowSettings,
    TuneSettings,
    in_plain_words,
)
from gradshield.cli.flags import CONFIG_ONLY, OUTPUT, REPLACED, flags_of, more_settings, name_file, settings_of
from gradshield.cli.terminal import console, print_json, safe, show, summary_table, trial_line, tuned_table
from gradshield.evaluation.config import EvaluationSettings


class _Stopped(Exception):
    """Ctrl-C as an exception that typer does not swallow."""


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            saved = "; ".join(getattr(stop, "__notes__", [])) or "nothing was saved yet"
            raise _Stopped(f"stopped: {saved}. To resume: {shlex.join(['gradshield', *sys.argv[1:]])}") from None
        except UserError as error:
            raise UserError(name_file(ctx, str(error))) from error

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """The list of commands as plain text: rich's help takes longer to import than everything else."""
        super(TyperGroup, self).format_help(ctx, formatter)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Find and remove the rows of a fine-tuning file that would make a language model stop refusing.",
)
_USAGE_ERROR: Any = typer.BadParameter.__mro__[2]  # ClickException, wherever this typer keeps its click
VERDICTS = {
    "aligned": "aligned, so it can score rows",
    "weak": "weakly aligned, so its scores are less certain",
    "not aligned": "not aligned, so it can't score rows",
}
CHECK_FACTS = ("mean_s", "first_tokens", "coverage", "not_covered", "read_at", "trl_trains")  # of its summary
MIN_COVERAGE = 0.9  # of the decoder's weights: with less, a score made of gradients says little

JsonOption = Annotated[bool, typer.Option("--json", rich_help_panel=OUTPUT, help="print JSON")]
OutOption = Annotated[
    Path, typer.Option("--out", "-o", metavar="PATH", help="output folder", parser=lambda out: _visible(out))
]
ProbesOption = Annotated[
    str | None,
    typer.Option("--probes", help="file of harmful requests (default: bundled)", callback=lambda file: _named(file)),
]


@app.callback(invoke_without_command=True)
def show_version(
    version: Annotated[bool, typer.Option("--version", help="print the version", is_eager=True)] = False,
) -> None:
    if version:
        from importlib.metadata import version as of

        print(f"gradshield {of('gradshield')}")
        raise typer.Exit


def _command(*kinds: type[BaseModel], name: str | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a function a command that takes the settings of these kinds as flags."""
    return lambda function: app.command(name, epilog=more_settings(*kinds))(flags_of(*kinds)(function))


@_command(FilterSettings)
def filter(
    context: typer.Context,
    path: Annotated[str, typer.Argument(help='file, folder, Hub dataset id, or "-" for stdin')],
    out: OutOption = Path("run"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show the plan and the time; write nothing")] = False,
    fail_above: Annotated[
        int | None,
        typer.Option(
            "--fail-above",
            min=0,
            rich_help_panel=OUTPUT,
            help="exit with code 1 if more rows than this are quarantined",
        ),
    ] = None,
    as_json: JsonOption = False,
    **flags: Any,
) -> None:
    """Keep the rows that are safe to train on, quarantine the rest."""
    (settings,) = settings_of(context, FilterSettings, flags=flags)
    if dry_run:
        from gradshield.screen.filter_once import estimate_file

        show(asdict(estimate_file(path, settings)), as_json, "dry run: nothing was written")
        return
    from gradshield.screen.filter_once import filter_file

    summary = filter_file(path, out, settings)
    if as_json:
        print_json(summary.as_dict())
    else:
        summary_table(summary, out)
    if fail_above is not None and summary.quarantined > fail_above:
        line = f"gradshield: {summary.quarantined:,} rows quarantined, more than the {fail_above:,} of --fail-above"
        print(line, file=sys.stderr)
        raise typer.Exit(1)


@_command(FilterSettings, FinetuneSettings, TuneSettings, EvaluationSettings)
def tune(
    context: typer.Context,
    path: Annotated[str, typer.Argument(help="file, folder or Hub dataset id")],
    out: OutOption = Path("tune-run"),
    as_json: JsonOption = False,
    **flags: Any,
) -> None:
    """Fine-tune until a model is safe and useful, or reject the file.

    Exit code 3: rejected.
    """
    kinds = (FilterSettings, FinetuneSettings, TuneSettings, EvaluationSettings)
    parts = settings_of(context, *kinds, flags=flags)
    from gradshield.tune.tune_once import tune_file

    summary = tune_file(path, out, *parts, on_trial=lambda trial: trial_line(trial, as_json))
    if summary is None or not is_first():
        return  # the first process says it
    if as_json:
        print_json(summary.as_dict())
    else:
        tuned_table(summary)
    if summary.accepted is None:
        raise typer.Exit(3)


@_command(ModelSettings)
def check(
    context: typer.Context,
    probes: ProbesOption = None,
    force: Annotated[bool, typer.Option(help="exit with 0 even if the model is not aligned")] = False,
    as_json: JsonOption = False,
    **flags: Any,
) -> None:
    """Check whether a model is aligned enough to score rows with."""
    from gradshield.screen.check_once import check_model

    (settings,) = settings_of(context, ModelSettings, flags=flags)
    found = check_model(settings, probes)
    if as_json:
        print_json(found.as_dict())
    else:
        table = Table("S", "refused", "probe", "answer", title=safe(found.model, 200))
        for probe in sorted(found.per_probe, key=lambda probe: probe.s):
            refused = "yes" if probe.refused else "no"
            table.add_row(f"{probe.s:+.1f}", refused, safe(probe.probe, 60), safe(probe.answer, 60))
        console.print(table)
        facts = found.as_dict() | {"coverage": f"{found.coverage:.0%}".replace("%", " %")}
        show({name: facts[name] for name in CHECK_FACTS if facts[name] not in ([], "")}, False, "")
        if found.coverage < MIN_COVERAGE:
            text = f"warning: gradient scores see only {found.coverage:.0%} of this model's decoder weights"
            console.print(f"{text}; the default score is not affected, since it reads hidden states", style="bold")
    verdict = f"{found.model} refuses {found.refused} of {found.probes} probes: {VERDICTS[found.grade]}"
    if found.grade == "not aligned" and not force:
        raise UserError(f"{verdict}; choose an aligned model")
    if not as_json:
        console.print(safe(verdict, 300), style="bold", soft_wrap=True)


@app.command()
def scorers(as_json: JsonOption = False) -> None:
    """List the scorers with their needs, costs and options.

    Choose one with --scorer NAME[:key=value,…].
    """
    from gradshield.scoring.registry import SCORERS

    _list(SCORERS, "forward passes per row", as_json)


@app.command()
def defenses(as_json: JsonOption = False) -> None:
    """List the defenses with their needs, costs and options.

    Choose one with `tune --defense NAME[:key=value,…]`.
    """
    from gradshield.defenses.registry import DEFENSES

    _list(DEFENSES, "trainings", as_json)


def _list(registry: Any, unit: str, as_json: bool) -> None:
    found = [registry.find(name)[0] for name in registry.names()]
    if as_json:
        fields = ("summary", "cost", "version", "columns")
        known = {
            s.name: {n: getattr(s, n) for n in fields if hasattr(s, n)} | {"needs": sorted(s.needs)} for s in found
        }
        print_json({s.name: known[s.name] | {"options": s.options.model_json_schema()["properties"]} for s in found})
        return
    table = Table(show_lines=True)
    table.add_column(f"--{registry.kind}", no_wrap=True)
    table.add_column("what it does")
    table.add_column(f"cost in {unit}", justify="right", max_width=14)
    for s in found:
        parts = {"needs": s.needs, "options": s.options.model_fields}
        also = [(f"\n{what}: {', '.join(sorted(names))}", "dim") for what, names in parts.items() if names]
        table.add_row(s.name, Text.assemble(s.summary, *also), f"{s.cost:g}")
    console.print(table)


@app.command()
def explain(
    run: Annotated[Path, typer.Argument(help="run folder")],
    row: Annotated[int, typer.Argument(help="row number, from 1")],
    as_json: JsonOption = False,
) -> None:
    """Show why a row got its score: signals, tokens, modules, probes."""
    from gradshield.screen.explain_once import explain_run

    result = explain_run(run, row)
    if as_json:
        print_json(asdict(result))
        return
    console.print(f"row {row}: score {result.score:+.2f}, threshold {result.threshold:+.2f}: {result.verdict}")
    for name, number in result.signals.items():
        console.print(f"  {name} {number:+.2f}")
    console.print("median of anchors: " + ", ".join(f"{k} {v:+.2f}" for k, v in result.anchors.items()))
    if result.refusal is not None:
        console.print(f"the same request, refused: {result.refusal:+.2f}")
    if not result.by_fihs:
        console.print("FIHS below is a second opinion: it did not set the verdict")
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
def review(
    run: Annotated[Path, typer.Argument(help="run folder")],
    other: Annotated[Path | None, typer.Argument(help="second run of the same file, to compare with")] = None,
    port: Annotated[int, typer.Option(help="port on 127.0.0.1; 0 is any free port")] = 0,
    who: Annotated[str | None, typer.Option(help="your name in the decisions (default: your login name)")] = None,
) -> None:
    """Read rows on a local page and decide: keep or quarantine.

    The page can also move the threshold. `apply` then rewrites the run's files.
    """
    from gradshield.review.server import serve

    serve(run, other, port, who, lambda address: print(f"review: {address}\n(Ctrl-C stops it)", flush=True))


@app.command()
def apply(run: Annotated[Path, typer.Argument(help="run folder")], as_json: JsonOption = False) -> None:
    """Rewrite a run's files with the decisions of its review."""
    from gradshield.review.apply import apply_decisions

    done = asdict(apply_decisions(run))
    show({name: done[name] for name in done if as_json or done[name] != ""}, as_json, f"files in {run}")


@_command(RowSettings, EvaluationSettings, name="eval")
def evaluate(
    context: typer.Context,
    safety: Annotated[
        bool,
        typer.Option("--safety", help="attack success on harmful requests, over-refusal on scary but harmless ones"),
    ] = False,
    task: Annotated[
        str | None,
        typer.Option(help="samsum, dialogsum, agnews, gsm8k, arc-easy, arc-challenge, a jsonl file, a task of lm-eval"),
    ] = None,
    rows: Annotated[str | None, typer.Option(help="file of held-out rows; the loss on them measures utility")] = None,
    out: OutOption = Path("eval-run"),
    as_json: JsonOption = False,
    **flags: Any,
) -> None:
    """Measure how safe and how useful a model is.

    Figures come with intervals, and all answers are saved.
    """
    settings, of = settings_of(context, EvaluationSettings, RowSettings, flags=flags)
    from gradshield.evaluation.eval_once import evaluate_model
    from gradshield.report.words import evaluation_in_words

    summary = evaluate_model(out, settings, of, safety=safety, task=task, rows=rows)
    show(summary.as_dict() if as_json else evaluation_in_words(summary), as_json, f"answers in {out}")


@app.command()
def align(
    out: OutOption,
    base: Annotated[str, typer.Option(help="model to align")] = "embedded-unaligned",
    as_json: JsonOption = False,
) -> None:
    """Rebuild the embedded model's alignment adapter.

    It is trained on the bundled requests and refusals.
    """
    import os

    from gradshield.data.run_folder import catch_write_errors
    from gradshield.models.load import load_model
    from gradshield.training.align import SETTINGS, alignment_report, write_card
    from gradshield.training.align import align as make

    with catch_write_errors(out):
        figures: dict[str, Any] = dict(make(base, out))
    aligned = load_model(base, adapter=str(out))
    report = alignment_report(aligned)
    folder = Path(os.environ.get("GRADSHIELD_DATA", ""))
    public = (folder / "advbench.jsonl", folder / "jbb_benign.jsonl")
    known = alignment_report(aligned, *public) if all(p.is_file() for p in public) else None
    with catch_write_errors(out):
        write_card(out, SETTINGS, report, known)
    figures |= report.figures()
    show(figures, as_json, f"adapter in {out}")


@app.command()
def demo(out: OutOption = Path("demo-run")) -> None:
    """Filter the bundled file of 300 rows with the embedded model."""
    from gradshield.base.assets import ASSETS
    from gradshield.data.run_folder import read_table
    from gradshield.screen.filter_once import filter_file

    summary = filter_file(str(ASSETS / "demo.jsonl"), out, FilterSettings())
    summary_table(summary, out)
    table = read_table(out).to_pydict()
    poison = [g == "poison" for g in table["group"]]
    caught = sum(p and v == "quarantined" for p, v in zip(poison, table["verdict"]))
    lost = sum(not p and v == "quarantined" for p, v in zip(poison, table["verdict"]))
    console.print(f"of the {sum(poison)} planted harmful rows, {caught} were quarantined; of the other rows, {lost}")


def main() -> None:
    """Runs the command line. A UserError becomes one line on stderr and exit code 2."""
    try:
        if processes() > 1 and sys.argv[1:2] != ["tune"]:
            if not is_first():
                sys.exit(2)
            raise UserError("only tune works with several processes: start this command without a launcher")
        sys.exit(app(standalone_mode=False) or 0)
    except UserError as error:
        message, code = str(error), 2
    except _USAGE_ERROR as error:  # what typer would draw a box around; without arguments, the help
        message, code = in_plain_words(error.format_message()), 2
        option = str(getattr(error, "option_name", ""))
        name = option.strip("-").replace("-", "_")
        if name in REPLACED:
            message = f"{option}: was removed; use {REPLACED[name]}"
        elif name in CONFIG_ONLY and hasattr(error, "possibilities"):  # no such flag; `check` has its own --probes
            message = f"{option} is not a flag: write `{name}: …` into a YAML file, and name that file with --config"
        elif context := getattr(error, "ctx", None):
            name = f" {context.info_name}" if context.parent else ""
            message = f"{message.rstrip('.')}. See gradshield{name} --help."
        if len(sys.argv) < 2:
            sys.exit(error.format_message())
    except _Stopped as stop:
        message, code = str(stop), 130
    except KeyboardInterrupt:  # before a command was called
        message, code = "stopped: nothing was saved yet", 130
    print(f"gradshield: {safe(message, 2000, markup=False)}", file=sys.stderr)
    sys.exit(code)


def _named(file: str | None) -> str | None:
    if file == "":
        raise UserError("--probes '': is empty; name a file, or leave it out")
    return file


def _visible(out: str | Path) -> Path:
    if not str(out):
        raise UserError("-o '': the folder's name is empty; give one, or leave out -o")
    if not str(out).isprintable():  # it could write to the terminal, or is not UTF-8
        raise UserError(f"-o {out}: invisible characters in the folder's name; choose another")
    return Path(out)
