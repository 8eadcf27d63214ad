"""`safe-lora`: after the training, project adapter layers onto the subspace that the alignment changed.

Source: Hsu et al., Safe LoRA: the Silver Lining of Reducing Safety Risks when Fine-tuning LLMs (2405.16833).

    V = W_aligned − W_base,   C = V Vᵀ / ‖V‖_F            for each Linear
    ΔW = B A   becomes   C ΔW = (C B) A   where   cos(C ΔW, ΔW) < τ

C is the paper's fast form of V (VᵀV)⁻¹ Vᵀ. It is no exact projection: it also scales by the size of V.

τ is .5, the default threshold in public copies of the authors' code. The default rule there is another: the ten layers
of lowest cosine are projected (select_layers_type "number", num_proj_layers 10). The paper chooses by model and data. A
layer that the alignment did not change, V = 0, is kept as it is.
"""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from gradshield.base.registry import NoOptions
from gradshield.defenses.base import Defense, DefenseContext
from gradshield.models.unaligned import load_unaligned, unaligned_name
from gradshield.training.interventions import Hooks
from gradshield.training.lora import lora_layers


class Options(NoOptions):
    """Options of `safe-lora`."""

    base: str | None = Field(default=None, description="the model before its alignment: folder or Hub id")
    threshold: float = Field(default=0.5, ge=-1, le=1, description="layers with a cosine below this are projected, τ")


def project(v: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, float]:
    """(C B [d_out, rank], cos(C ΔW, ΔW)) of V [d_out, d_in], A [rank, d_in] and B [d_out, rank]."""
    moved = v @ (v.T @ b) / v.norm()  # C itself is d_out × d_out
    return moved, float(torch.cosine_similarity((moved @ a).flatten(), (b @ a).flatten(), dim=0))


def check(context: DefenseContext, options: Options) -> None:
    """Raises UserError where the model before its alignment is not known."""
    unaligned_name(context.model, options.base)


def hooks(context: DefenseContext, options: Options) -> Hooks:
    """Projects the trained adapter."""
    base = load_unaligned(context.model, options.base)  # now, so that a wrong one is said before the training

    def finish(net: Any) -> None:
        for layer in lora_layers(net):
            before = layer.oriented(base.net.get_submodule(layer.name)).to(layer.weight)
            v = (layer.weight - before).float()
            if not v.any():
                continue
            moved, cosine = project(v, layer.a.weight.float(), layer.b.weight.float())
            if cosine < options.threshold:
                layer.b.weight.copy_(moved)

    return Hooks(finish=finish)


DEFENSE = Defense(
    "safe-lora",
    "project the trained adapter onto what the alignment changed",
    Options,
    needs=frozenset({"adapter", "base model"}),
    hooks=hooks,
    check=check,
)
