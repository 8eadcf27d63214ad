"""A LoRA adapter on top of the frozen model for the time of a score: for baselines that must train to score.

`y += scale · B A x` by hooks, so the model itself is as it was afterwards. Experts stored in one weight go without.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradshield.base.progress import progress
from gradshield.data.encode import Example
from gradshield.data.examples import token_counts
from gradshield.models.batching import losses, map_by_length
from gradshield.models.experts import Expert
from gradshield.models.hooks import gradients_from
from gradshield.models.load import Model
from gradshield.scoring.fihs.descent import no_gradient
from gradshield.scoring.fihs.probe import Factors, ProbeGradient, lora_inputs


@dataclass(frozen=True)
class Adapter:
    """The factors of each Linear, float32; B is zero at the start."""

    a: dict[str, Tensor]  # [rank, d_in]
    b: dict[str, Tensor]  # [d_out, rank]
    scale: float = 4.0  # alpha 32 over rank 8

    def delta(self) -> ProbeGradient:
        """The low-rank factors of the change to the weights; rank 0 if there is none."""
        return ProbeGradient({n: Factors(a.detach(), self.b[n].detach().T * self.scale) for n, a in self.a.items()})

    def arrays(self, prefix: str) -> dict[str, np.ndarray]:
        """Its factors for `Context.cached`, under names that begin with the prefix."""
        sides = {"a": self.a, "b": self.b}
        return {f"{prefix}.{s}.{n}": w.detach().cpu().numpy().copy() for s, of in sides.items() for n, w in of.items()}


def new_adapter(model: Model, rank: int = 8, seed: int = 0) -> Adapter:
    """An adapter as PEFT draws it, with alpha 32, on every Linear of the decoder."""
    linears = {name: f for name, f in no_gradient(model).factors.items() if not isinstance(model.linears[name], Expert)}
    a = lora_inputs(ProbeGradient(linears), rank, seed)
    b = {name: torch.zeros(f.out.shape[1], rank, device=f.out.device) for name, f in linears.items()}
    return Adapter({name: w.requires_grad_() for name, w in a.items()}, {n: w.requires_grad_() for n, w in b.items()})


def adapter_of(model: Model, arrays: Mapping[str, np.ndarray], prefix: str) -> Adapter:
    """The adapter that `arrays` were made of."""
    place = {name: f.inp.device for name, f in no_gradient(model).factors.items()}
    sides: list[dict[str, Tensor]] = []
    for side in "ab":
        start = f"{prefix}.{side}."
        names = [name for name in arrays if name.startswith(start)]
        sides.append({n[len(start) :]: torch.from_numpy(arrays[n]).to(place[n[len(start) :]]) for n in names})
    return Adapter(sides[0], sides[1])


@contextmanager
def laid_over(model: Model, adapter: Adapter) -> Iterator[None]:
    """Context in which the model computes with the adapter."""

    def hook(name: str):
        def add(_module: object, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = args[0].to(adapter.a[name].dtype)
            return output + (adapter.scale * (x @ adapter.a[name].T @ adapter.b[name].T)).to(output.dtype)

        return add

    modules = [(model.linears[name], name) for name in adapter.a]
    handles = [module.register_forward_hook(hook(name)) for module, name in modules if not isinstance(module, Expert)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def train_adapter(
    model: Model,
    adapter: Adapter,
    examples: Sequence[Example],
    *,
    epochs: float,
    learning_rate: float,
    tokens: int,
    after: Callable[[float, float], None] = lambda *_: None,
) -> None:
    """Trains the adapter on the examples: AdamW, batch 8, linear decay, as the paper's section 4.

    `tokens` bounds what is computed at once; `after` is told each step's share of the training and its learning rate.
    """
    size = min(8, len(examples))
    steps = max(1, round(epochs * len(examples) / size))
    optimizer = torch.optim.AdamW([*adapter.a.values(), *adapter.b.values()], learning_rate, weight_decay=0.0)
    draw, order = np.random.default_rng(0), np.empty(0, dtype=int)
    with laid_over(model, adapter), progress("training", 0, steps) as advance:
        for step in range(steps):
            if len(order) < size:
                order = np.concatenate([order, draw.permutation(len(examples))])
            chosen, order = [examples[n] for n in order[:size]], order[size:]
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * (1 - step / steps)
            optimizer.zero_grad()
            backward(model, adapter, chosen, np.full(len(chosen), 1 / len(chosen)), tokens)
            optimizer.step()
            after((step + 1) / steps, learning_rate * (1 - step / steps))
            advance(0, 1)


def backward(
    model: Model, adapter: Adapter, examples: Sequence[Example], weights: np.ndarray, tokens: int
) -> np.ndarray:
    """The examples' losses [N], float64. Adds the gradient of their weighted sum to the adapter's `.grad`."""
    trained = [*adapter.a.values(), *adapter.b.values()]

    def run(batch: Sequence[int]) -> np.ndarray:
        with gradients_from(model):
            loss = losses(model, [examples[n] for n in batch])
            total = (loss * torch.from_numpy(weights[batch]).to(loss)).sum()
            gradients = torch.autograd.grad(total, trained, allow_unused=True)
        for weight, gradient in zip(trained, gradients):  # not by `backward()`: out of memory, it leaves half of them
            if gradient is not None:
                weight.grad = gradient if weight.grad is None else weight.grad + gradient
        return loss.detach().double().numpy()

    return np.array(map_by_length(run, token_counts(examples), tokens))
