"""The ways to score, and what they are measured against; each under one small contract.

A method is opened for a task (a model and a probe) and rows, and gives a function that does the work once. What is
there before rows are seen (the probe's gradient, a wrapped model) is made on opening and is not timed.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from gradshield.base.assets import ASSETS
from gradshield.data.encode import Example
from gradshield.data.requests import read_requests
from gradshield.models.batching import batches, pad
from gradshield.models.hooks import gradients_from, linear_hooks, logits_at
from gradshield.models.load import Model
from gradshield.scoring.base import ScoreFunction, Scores
from gradshield.scoring.engine import score
from gradshield.scoring.fihs.autograd import autograd_scorer
from gradshield.scoring.fihs.probe import ProbeGradient, SafetyScore, margin, paper_tokens, probe_gradient
from gradshield.scoring.fihs.scorer import fihs_scorer
from gradshield.scoring.intent.fit import LANDMARKS
from gradshield.scoring.intent.kernel import Kernel
from gradshield.scoring.intent.reading import Readouts, intent_scores, read_layer, scored_part

STEP = 3e-3  # of the central difference: ‖ε ∇S‖ over all weights


@dataclass(frozen=True)
class Task:
    """A model, the probes whose ∇S every method takes the product with, and the tokens of a batch, padding included."""

    model: Model
    requests: tuple[str, ...]
    safe: int
    unsafe: int
    batch_tokens: int = 2048

    @property
    def s(self) -> SafetyScore:
        """S of eq. 5."""
        return margin([self.safe], [self.unsafe])

    @cached_property
    def gradient(self) -> ProbeGradient:
        """∇S in factors, as the product makes it."""
        return probe_gradient(self.model, self.requests, self.s)


@dataclass(frozen=True)
class Outcome:
    """Of one run: a score for every row where the method gives one, and its own clock where it has a better one."""

    scores: np.ndarray | None = None
    seconds: float | None = None


Run = Callable[[], Outcome]


@dataclass(frozen=True)
class Method:
    """How a method is opened, its name in the tables, and what must be installed for it."""

    label: str
    open: Callable[[Task, Sequence[Example]], AbstractContextManager[Run]]
    needs: tuple[str, ...] = ()
    exact: bool = False  # its scores are to be those of autograd


def make_task(model: Model, requests: Sequence[str] | None = None, batch_tokens: int = 2048) -> Task:
    """The benchmark's task: S of eq. 5 on the first bundled probe, or on `requests`."""
    requests = requests or read_requests(ASSETS / "probes.jsonl")[:1]
    return Task(model, tuple(requests), *paper_tokens(model.tokenizer), batch_tokens)


def by_batch(task: Task, rows: Sequence[Example], one: Callable[[list[Example]], Tensor]) -> np.ndarray:
    """What `one` says of every row, batched as the product batches."""
    result = np.zeros(len(rows))
    for batch in batches(rows, task.batch_tokens):
        result[batch] = one([rows[n] for n in batch]).double().cpu().numpy()
    return result


def losses(logits: Tensor, rows: Tensor, targets: Tensor, weights: Tensor, count: int) -> Tensor:
    """Mean next-token cross-entropy [count] of every row, from the logits of the response tokens."""
    each = torch.nn.functional.cross_entropy(logits.float(), targets.to(logits.device), reduction="none")
    return torch.zeros(count, device=each.device).index_add_(0, rows.to(each.device), each * weights.to(each.device))


@torch.no_grad()
def losses_by_forward(task: Task, batch: list[Example]) -> Tensor:
    """The rows' losses [B] by one forward pass, logits at response tokens only."""
    ids, rows, positions, targets, weights = pad(batch, task.model.device)
    return losses(logits_at(task.model, ids, rows, positions), rows, targets, weights, len(batch))


@contextmanager
def forward(task: Task, rows: Sequence[Example]) -> Iterator[Run]:
    """The unit: one forward pass without gradients, logits at response tokens only."""
    yield lambda: _nothing(by_batch(task, rows, lambda batch: losses_by_forward(task, batch)))


@contextmanager
def full_logits(task: Task, rows: Sequence[Example]) -> Iterator[Run]:
    """The same with the logits of every token, as a plain call of the model gives them."""

    @torch.no_grad()
    def one(batch: list[Example]) -> Tensor:
        ids, where, positions, targets, weights = pad(batch, task.model.device)
        logits = task.model.net(input_ids=ids, use_cache=False).logits
        return losses(logits[where, positions], where, targets, weights, len(batch))

    yield lambda: _nothing(by_batch(task, rows, one))


@contextmanager
def activations(task: Task, rows: Sequence[Example]) -> Iterator[Run]:
    """The floor of any score that needs δ at every token: a forward pass, and the backward pass of the activations
    alone."""

    def one(batch: list[Example]) -> Tensor:
        ids, where, positions, targets, weights = pad(batch, task.model.device)
        with gradients_from(task.model):
            each = losses(logits_at(task.model, ids, where, positions), where, targets, weights, len(batch))
            each.sum().backward()
        return each.detach()

    yield lambda: _nothing(by_batch(task, rows, one))


@contextmanager
def lora_epoch(task: Task, rows: Sequence[Example]) -> Iterator[Run]:
    """One epoch of LoRA by TRL's SFTTrainer with the settings of `gradshield tune`; its own training clock, in which no
    checkpoint is written."""
    from transformers.trainer_utils import SaveStrategy

    from gradshield.training import finetune as room

    real = room._trainer

    def without_checkpoints(*arguments: Any) -> Any:
        trainer = real(*arguments)
        trainer.args.save_strategy = SaveStrategy.NO
        return trainer

    with tempfile.TemporaryDirectory() as folder, patch.object(room, "_trainer", without_checkpoints):
        settings = room.FinetuneSettings(epochs=1)
        yield lambda: Outcome(seconds=room.finetune(task.model, rows, Path(folder), settings)["seconds"])


@contextmanager
def autograd(task: Task, rows: Sequence[Example]) -> Iterator[Run]:
    """The slow, obvious way: row by row, the whole gradient, one dot product."""
    scorer = autograd_scorer(task.model, task.requests, task.s)
    yield lambda: Outcome(np.concatenate([scorer([row])["score"] for row in rows]))


def dense_gradient(task: Task) -> dict[str, Tensor]:
    """∇S of every Linear as a matrix [d_out, d_in], as precise as the model."""
    exact = probe_gradient(task.model, task.requests, task.s, tolerance=0)
    return {name: f.dense().to(task.model.net.dtype) for name, f in exact.factors.items()}


@contextmanager
def dense_hooks(task: Task, rows: Sequence[Example]) -> Iterator[Run]:
    """The paper's way: the dense gradient of every layer against activations and their gradients, in hooks."""
    dense = dense_gradient(task)

    def one(batch: list[Example]) -> Tensor:
        total = torch.zeros(len(batch), device=task.model.device)

        def backward(name: str, x: Tensor, delta: Tensor) -> None:
            total.add_(((x @ dense[name].T) * delta).float().sum((1, 2)).to(total.device))  # Σ_t δ_tᵀ G x_t

        ids, where, positions, targets, weights = pad(batch, task.model.device)
        with linear_hooks(task.model.linears, lambda _name, x: x, backward), gradients_from(task.model):
            logits = logits_at(task.model, ids, where, positions)
            losses(logits, where, targets, weights, len(batch)).sum().backward()
        return total

    yield lambda: Outcome(by_batch(task, rows, one))


@contextmanager
def central_difference(task: Task, rows: Sequence[Example]) -> Iterator[Run]:
    """(L(θ + ε∇S) − L(θ − ε∇S)) / 2ε: two forward passes with the probe gradient as an adapter at ±ε."""
    factors = task.gradient.factors
    step = STEP / sum(float(f.dense().float().square().sum()) for f in factors.values()) ** 0.5

    def side(epsilon: float) -> np.ndarray:
        def attach(name: str) -> Callable[..., Tensor]:
            inp, out = factors[name].inp, factors[name].out
            return lambda _module, args, y: y + epsilon * ((args[0] @ inp.T.to(y.dtype)) @ out.to(y.dtype))

        handles = [task.model.linears[name].register_forward_hook(attach(name)) for name in factors]
        try:
            return by_batch(task, rows, lambda batch: losses_by_forward(task, batch))
        finally:
            for handle in handles:
                handle.remove()

    yield lambda: Outcome((side(step) - side(-step)) / (2 * step))


def fihs(variant: str) -> Callable[[Task, Sequence[Example]], AbstractContextManager[Run]]:
    """Ours: the low-rank contraction in backward hooks, raw ("paper") or normalised ("module"). The latter's norms are
    estimates, whose error `python -m benchmarks levers` has, so it is not held against autograd's raw score."""

    @contextmanager
    def opened(task: Task, rows: Sequence[Example]) -> Iterator[Run]:
        scorer = fihs_scorer(task.model, task.gradient, variant)

        def run() -> Outcome:
            scores = _scored(task, rows, scorer)["score"]
            return Outcome(scores if variant == "paper" else None)

        yield run

    return opened


@contextmanager
def intent(task: Task, rows: Sequence[Example]) -> Iterator[Run]:
    """Ours, the default score: hidden states of the middle layer and three readouts.

    What the readouts say does not change what they cost, so they are drawn at random instead of fitted.
    """
    width = task.model.net.config.hidden_size
    rng = np.random.default_rng(0)
    landmarks = (rng.normal(size=(LANDMARKS, width)) / width**0.5).astype(np.float16)
    kernel = Kernel(np.zeros(width), np.ones(width), landmarks, rng.normal(size=LANDMARKS), 0.0)
    drawn = Readouts(read_layer(task.model), rng.normal(size=(width, 2)), np.zeros(2), kernel)

    def scorer(batch: Sequence[Example]) -> Scores:
        return intent_scores(task.model, drawn, batch)

    yield lambda: _nothing(_scored(task, scored_part(task.model, rows), scorer)["score"])


def _scored(task: Task, rows: Sequence[Example], scorer: ScoreFunction) -> dict[str, np.ndarray]:
    return score(rows, scorer, batch_tokens=task.batch_tokens)


def _nothing(_values: np.ndarray) -> Outcome:
    return Outcome()


METHODS: dict[str, Method] = {
    "forward": Method("forward pass (the unit)", forward),
    "full-logits": Method("forward pass, every logit", full_logits),
    "activations": Method("forward and backward of activations alone", activations),
    "lora": Method("LoRA epoch (TRL)", lora_epoch, ("trl.trainer.sft_trainer", "peft")),
    "autograd": Method("per-example autograd", autograd, exact=True),
    "dense": Method("dense hook contraction (the paper's way)", dense_hooks, exact=True),
    "central": Method("central difference", central_difference, exact=True),
    "paper": Method("**GradShield, raw FIHS** (`paper`)", fihs("paper"), exact=True),
    "module": Method("**GradShield, normalised FIHS** (`module`)", fihs("module")),
    "intent": Method("**GradShield, the default score** (`intent`)", intent),
}
