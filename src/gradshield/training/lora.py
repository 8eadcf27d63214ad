"""The LoRA layers that PEFT adds to the Linears of a network."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class LoraLayer:
    """ΔW = scale · B A, laid over one Linear."""

    name: str  # of the Linear, in the network without the adapter
    a: nn.Linear  # weight [rank, d_in]
    b: nn.Linear  # weight [d_out, rank]
    scale: float
    linear: nn.Module
    transposed: bool  # the Linear's weight is [d_in, d_out], as of a Conv1D

    @property
    def weight(self) -> Tensor:
        """The frozen weight below the adapter, [d_out, d_in]."""
        return self.oriented(self.linear)

    def oriented(self, linear: nn.Module) -> Tensor:
        """The weight [d_out, d_in] of this Linear, or of its like in another network."""
        weight: Any = linear.weight
        return weight.T if self.transposed else weight


def lora_layers(net: Any) -> Iterator[LoraLayer]:
    """The LoRA layers of the network that a `finish` hook gets, first to last."""
    for name, module in net.get_base_model().named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            sides = module.lora_A["default"], module.lora_B["default"]
            yield LoraLayer(name, *sides, module.scaling["default"], module.base_layer, bool(module.fan_in_fan_out))
