"""The commands that are killed and run out of disk, on a tiny model, each in a folder of its own."""

import io
import json
import pkgutil
import re
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
from conftest import random_examples, tiny_net, tiny_tokenizer

import gradshield.base.assets
import gradshield.cli.commands
import gradshield.evaluation.measure
import gradshield.report.figure
import gradshield.scoring.anchors
import gradshield.scoring.check
import gradshield.screen.filter
import gradshield.threshold
import gradshield.training.align
import gradshield.tune.command
import gradshield.tune.measuring
import gradshield.tune.trials
from gradshield.base.assets import ASSETS
from gradshield.base.errors import UserError
from gradshield.base.settings import FilterSettings
from gradshield.cli import main
from gradshield.data.requests import read_requests
from gradshield.models.load import load_model
from gradshield.report.figure import Drawing
from gradshield.review import store
from gradshield.review.state import Review
from gradshield.scoring.check import AlignmentCheck

ROWS = [{"prompt": f"Question {n}", "completion": f"Answer {n * n}"} for n in range(12)]


@dataclass(frozen=True)
class Command:
    """What is run in an empty folder, after `before` was put into it."""

    name: str
    work: Callable[[], object]
    before: str | None = None  # the command whose result it needs
    costly: bool = False  # seconds rather than a second


def prepare(work: Path) -> list[Command]:
    """Puts a tiny model and the inputs into `work`, makes this process ready to be forked, and returns the commands."""
    tokenizer = tiny_tokenizer()
    tiny_net(tokenizer).save_pretrained(work / "model")
    tokenizer.save_pretrained(work / "model")
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    (work / "rows.jsonl").write_text(text + '{"prompt": "half a li\n')
    (work / "parts").mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        (work / "parts" / name).write_text(text)
    pq.write_table(pa.Table.from_pylist(ROWS), work / "rows.parquet")
    (work / "batches.yaml").write_text("batch_tokens: 100\n")
    demo = (ASSETS / "demo.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (work / "demo.jsonl").write_text("".join(demo[::25]), encoding="utf-8")
    (work / "task.jsonl").write_text('{"prompt": "p", "answer": "x"}\n')
    _tame(len(tokenizer))
    _warm(str(work / "model"))
    model, task = ("--model", str(work / "model")), ("--task", str(work / "task.jsonl"))
    scoring = ("--scorer", "fihs:probes=1", "--threshold", "share", "--value", "0.25")
    measuring = ("--request-count", "2", "--max-new-tokens", "2", "--scary", "none")

    def command(*words: str) -> Callable[[], object]:
        return lambda: _run(*words)

    rows = str(work / "rows.jsonl")

    def filtered(name: str) -> Callable[[], object]:
        return command("filter", str(work / name), *model, *scoring, "--config", str(work / "batches.yaml"))

    training = ("--epochs", "2", "--batch", "8", "--max-asr", "1", "--min-utility", "0", "--max-length", "64")
    return [
        Command("filter", filtered("rows.jsonl")),
        Command("review", _reviewed, before="filter"),
        Command("apply", command("apply", "run"), before="review"),
        Command("demo", lambda: _demo(work)),
        Command("explain", _explained, before="demo"),
        Command("eval", command("eval", "--safety", *task, *model, *measuring)),
        Command("check", command("check", "--force", *model)),
        Command("filter a folder", filtered("parts")),
        Command("filter parquet", filtered("rows.parquet")),
        Command("align", command("align", "-o", "adapter", "--base", str(work / "model")), costly=True),
        Command("tune", command("tune", rows, *model, *scoring, *task, *measuring, *training), costly=True),
    ]


def _run(*words: str) -> None:
    sys.argv = ["gradshield", *words]
    main()


def _explained() -> None:
    """`explain`, with what it prints in a file beside the run, so that it is compared."""
    try:
        with redirect_stdout(io.StringIO()) as said:
            _run("explain", "demo-run", "3", "--json")
    except SystemExit as stop:
        if stop.code:
            raise
    with io.FileIO("explained.json", "w") as file:  # no operation of the command's
        file.write(said.getvalue().encode())


def _demo(work: Path) -> None:
    """`demo` with every 25th row of its file, the tiny model and a score that needs no fit: else it takes minutes."""
    tiny = {"model": str(work / "model"), "scorer": "fihs:probes=1", "batch_tokens": 1000}
    gradshield.base.assets.ASSETS = work  # which `demo` alone reads when it runs
    gradshield.cli.commands.FilterSettings = partial(FilterSettings, **tiny)  # type: ignore[misc]
    _run("demo")


def _reviewed() -> None:
    try:
        review = Review(Path("run"), None, "ann")
        decided = {row: d.verdict for row, d in review.decisions()[1].items()}
        for row, verdict in ((1, "quarantined"), (2, "kept"), (3, "quarantined")):
            if decided.get(row) != verdict:
                store.decide(Path("run"), row, verdict, "note", "ann")
    except UserError as error:  # as the command line does
        print(f"gradshield: {error}", file=sys.stderr)
        sys.exit(2)


def _warm(model: str) -> None:
    """Imports what the commands import when they need it, and tries the model once: a fork has both already."""
    for _, name, _ in pkgutil.walk_packages(gradshield.__path__, "gradshield."):
        if not name.endswith((".ray", "__main__")):
            import_module(name)
    for name in ("peft", "sklearn.linear_model", "transformers.trainer", "trl.chat_template_utils"):
        import_module(name)
    load_model(model)


def _tame(vocabulary: int) -> None:
    """A random model counts as aligned and tells its few anchors apart, no clock is in what comes out, and the figures
    take no time."""
    every = gradshield.scoring.anchors.anchor_rows
    gradshield.scoring.anchors.anchor_rows = lambda kind: every(kind)[:4]
    gradshield.threshold.anchored = lambda scores, good, harmful: gradshield.threshold.share(scores, 0.25)
    probes = tuple(read_requests(ASSETS / "probes.jsonl"))
    yes = AlignmentCheck(probes, (True,) * len(probes), ("I can't",) * len(probes), (1.0,) * len(probes), ())
    gradshield.scoring.check.check_alignment = lambda *_: yes
    gradshield.training.align.alignment_examples = lambda _: random_examples(8, vocabulary)
    report = gradshield.training.align.AlignmentReport("tiny", 1, 0.0, (0.0, 1.0), None, 1, 0.0, (0.0, 1.0), ())
    gradshield.training.align.alignment_report = lambda *_: report
    gradshield.report.figure.draw = lambda figure, label, notes=(): Drawing(label, label, notes=notes)
    still = SimpleNamespace(monotonic=lambda: 0.0)
    for module in (gradshield.evaluation.measure, gradshield.tune.measuring, gradshield.tune.trials):
        module.time = still  # type: ignore[attr-defined]
    ticks = iter([0.0])
    gradshield.screen.filter.time = SimpleNamespace(monotonic=lambda: next(ticks, 1.0))  # type: ignore[attr-defined]


def start(command: Command, results: dict[str, Path], place: Path) -> None:
    """An empty folder for the command, or a copy of what it needs."""
    shutil.rmtree(place, ignore_errors=True)
    if command.before:
        shutil.copytree(results[command.before], place)
    else:
        place.mkdir(parents=True)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below the folder with its bytes; of a database, what is in it."""
    found = {}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.name.startswith("review.sqlite"):
            if file.name == "review.sqlite":
                entries = store.decisions_in_force(file.parent).values()
                found[name] = repr([(d.row, d.verdict, d.note, d.who) for d in entries]).encode()
        elif file.is_file():
            data = file.read_bytes()
            found[name] = _without_times(data) if file.suffix in (".yaml", ".html") else data
        elif file.is_symlink():
            found[name] = b"link"
    return found


def _without_times(data: bytes) -> bytes:
    data = re.sub(rb"# sha256 of what follows: [0-9a-f]+", b"", data)
    return re.sub(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\+00:00)?", b"", data)
