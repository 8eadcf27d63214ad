"""Mixtures of experts: one stacked 3-D weight for all experts, seen as the Linears that it is made of.

transformers computes such experts by a function that the config names, mostly grouped matrix products. Ours computes
one expert after the other, and shows each one's inputs and outputs.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Tap = Callable[[str, int, Tensor, Tensor, Tensor], None]
"""Gets (weight's name, expert's number, x [n, d_in], y [n, d_out], place in the flattened batch [n], ascending)."""
_NAME = "gradshield"  # of our function, among transformers' ways to compute experts


@dataclass(frozen=True, eq=False)
class Expert:
    """One expert's matrix in a stacked weight: y = W x (+ b), for the tokens routed to it."""

    module: Any  # holds the stacked weights of all its experts
    projection: str  # the stacked weight's name in it
    number: int

    @property
    def stacked(self) -> nn.Parameter:
        """The stacked weight [experts, ·, ·], which is what has a gradient."""
        return getattr(self.module, self.projection)

    @property
    def weight(self) -> Tensor:
        """W [d_out, d_in], a view."""
        weight = self.stacked[self.number]
        return weight.T if self.module.is_transposed else weight

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        _, first, second = self.stacked.shape
        return (second, first) if self.module.is_transposed else (first, second)


def experts_of(name: str, module: Any) -> dict[str, Expert]:
    """Name → matrix of each expert in the module called `name`; none where it isn't one that we can compute."""
    if not (hasattr(module, "has_gate") and hasattr(module, "is_transposed") and hasattr(module, "_apply_gate")):
        return {}  # not written for transformers' choice of functions
    stacked = {p: getattr(module, p, None) for p in ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")}
    if not all(isinstance(w, Tensor) and w.ndim == 3 and w.dtype.itemsize > 1 for w in stacked.values()):
        return {}  # quantised: the numbers need their scales
    return {
        f"{name}.{number}.{projection}": Expert(module, projection, number)
        for number in range(module.num_experts)
        for projection in stacked
    }


@contextmanager
def experts_one_by_one(taps: Sequence[tuple[Any, Tap]]) -> Iterator[None]:
    """Within it, each of these modules computes one expert after the other and calls its tap twice an expert.

    The outputs are what they were; an expert that no token is routed to is not computed.
    """
    if not taps:
        yield
        return
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    of = {id(module): tap for module, tap in taps}
    configs = {id(module.config): module.config for module, _ in taps}.values()
    before = [(config, config._experts_implementation_internal) for config in configs]  # the public one sets more
    ALL_EXPERTS_FUNCTIONS[_NAME] = lambda module, *args: _forward(module, of.get(id(module), lambda *_: None), *args)
    for config in configs:
        config._experts_implementation_internal = _NAME
    try:
        yield
    finally:
        for config, name in before:
            config._experts_implementation_internal = name
        del ALL_EXPERTS_FUNCTIONS[_NAME]


def _forward(module: Any, tap: Tap, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """What the experts add [N, d], for hidden [N, d], the experts chosen [N, k], and the router's weights [N, k]."""
    count = chosen.shape[-1]
    order = chosen.flatten().argsort(stable=True)  # by expert, and within an expert by place
    sizes = chosen.flatten().bincount(minlength=module.num_experts).tolist()
    places = (order // count).split(sizes)
    outputs = []
    for number, (place, x) in enumerate(zip(places, hidden[order // count].split(sizes))):
        if not len(place):
            continue

        def linear(projection: str, x: Tensor, number: int = number, place: Tensor = place) -> Tensor:
            bias = getattr(module, f"{projection}_bias")[number] if module.has_bias else None
            y = nn.functional.linear(x, Expert(module, projection, number).weight, bias)
            tap(projection, number, x, y, place)
            return y

        if module.has_gate:
            inner = module._apply_gate(linear("gate_up_proj", x))
        else:
            inner = module.act_fn(linear("up_proj", x))
        y = linear("down_proj", inner)
        outputs.append(module.post_expert_norm(y) if module.has_post_expert_norm else y)
    weighted = torch.cat(outputs) * weights.flatten()[order, None]
    back = order.argsort()
    return weighted[back].view(len(hidden), count, -1).sum(1).to(hidden.dtype)
