"""`nlsr`: after the training, restore the safety-critical neurons of the layers that drifted most from the alignment.

Source: Yi et al., NLSR: Neuron-Level Safety Realignment of LLMs Against Harmful Fine-Tuning (2412.12497), and the
authors' code. For each Linear, with V = W_reference − W_base and X its inputs at the tokens of refusals:

    U = the `rank` leading left singular vectors of V X        neuron i's importance: ‖(U Uᵀ V)_i‖
    R = the `share` of neurons of highest importance           drift: cos(V_R, (V + ΔW)_R)
    P(restore a layer) = rate − spread (the highest cosine) … rate + spread (the lowest), by rank of its cosine
    restored:  W_R ← W_reference_R

The reference is the aligned model. The paper amplifies it to W + β (W − W_base), and its neurons are single weights of
one adapter, trained on from the alignment's. Here the user's adapter is a new one, in whose B A only whole rows of ΔW
can be restored exactly, to the aligned model (B_i = 0): so a neuron is a row, and β = 0. `share`, `rate` and `spread`
are those of the authors' scripts (xinykou/NLSR: sparsity_ratio .8, which we take for the share of critical neurons,
prune_rate .5 and epsilon .2); `rank` is ours. The scripts read 2,000 samples; here it is the bundled refusals. In the
code (src/safe_lora/transfer_inner.py) the most similar layers are the likelier ones; here, as the paper's text says,
the least similar.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from gradshield.base.registry import NoOptions
from gradshield.defenses.base import Defense, DefenseContext
from gradshield.models.load import Model
from gradshield.models.unaligned import load_unaligned, unaligned_name
from gradshield.scoring.inputs import input_grams
from gradshield.training.interventions import Hooks
from gradshield.training.lora import LoraLayer, lora_layers

GRAM_BYTES = 1 << 30  # of Gram matrices in memory at a time


class Options(NoOptions):
    """Options of `nlsr`."""

    base: str | None = Field(default=None, description="the model before its alignment: folder or Hub id")
    rank: int = Field(default=8, ge=1, description="singular vectors that make the safety subspace")
    share: float = Field(default=0.8, ge=0, le=1, description="share of a layer's neurons that are safety-critical")
    rate: float = Field(default=0.5, ge=0, le=1, description="mean probability that a layer is restored")
    spread: float = Field(default=0.2, ge=0, le=1, description="added for the layer that drifted most")


def critical_rows(v: Tensor, gram: Tensor, rank: int, share: float) -> Tensor:
    """Indices of the rows of V [d_out, d_in] of highest importance; `gram` is X Xᵀ [d_in, d_in]."""
    with torch.random.fork_rng():  # svd_lowrank draws; every process must come to the same rows
        torch.manual_seed(0)
        among = v @ gram @ v.T
        u, _, _ = torch.svd_lowrank(among, q=min(rank + 8, len(among)), niter=4)
    u = u[:, :rank]
    importance = (u @ (u.T @ v)).norm(dim=1)
    return importance.topk(int(share * len(v))).indices


def restored_layers(cosines: Sequence[float], rate: float, spread: float, seed: int) -> np.ndarray:
    """Mask of the layers that are restored, drawn with a probability that rises as the cosine's rank falls."""
    rank = np.argsort(np.argsort(-np.asarray(cosines), kind="stable"), kind="stable")  # 0: the highest cosine
    chance = rate - spread + 2 * spread * rank / max(1, len(rank) - 1)
    return np.random.default_rng(seed).random(len(rank)) < chance


def check(context: DefenseContext, options: Options) -> None:
    """Raises UserError where the model before its alignment is not known."""
    unaligned_name(context.model, options.base)


def hooks(context: DefenseContext, options: Options) -> Hooks:
    """Restores rows of the trained model."""
    model, base = context.model, load_unaligned(context.model, options.base)

    def finish(net: Any) -> None:
        drifted: list[tuple[LoraLayer, Tensor, float]] = []
        net.eval()
        for group in layer_groups(model, list(lora_layers(net))):
            with net.disable_adapter():
                linears = [layer.linear for layer in group]
                grams = input_grams(model, linears, context.anchors["refusal"], context.model.batch_tokens)
            for layer, gram in zip(group, grams):
                before = layer.oriented(base.net.get_submodule(layer.name)).to(layer.weight)
                v = (layer.weight - before).float()
                if v.any():  # else the alignment left nothing here to restore
                    rows = critical_rows(v, gram, options.rank, options.share)
                    delta = layer.scale * layer.b.weight[rows].float() @ layer.a.weight.float()
                    ends = v[rows].flatten(), (v[rows] + delta).flatten()
                    drifted.append((layer, rows, float(torch.cosine_similarity(*ends, dim=0))))
        cosines = [cosine for _, _, cosine in drifted]
        chosen = restored_layers(cosines, options.rate, options.spread, context.training.seed)
        for (layer, rows, _), restored in zip(drifted, chosen):
            if restored:
                layer.b.weight[rows] = 0

    return Hooks(finish=finish)


def layer_groups(model: Model, layers: Sequence[LoraLayer], room: int = GRAM_BYTES) -> list[list[LoraLayer]]:
    """The decoder blocks' layers, in groups whose Gram matrices fit into `room` bytes. Each group costs a forward pass
    over the safe rows."""
    inside = {id(module) for block in model.layers for module in block.modules()}
    found: list[list[LoraLayer]] = []
    left = 0
    for layer in layers:
        if id(layer.linear) in inside:
            size = 4 * layer.a.in_features**2
            if size > left or not found:
                found.append([])
                left = room
            found[-1].append(layer)
            left -= size
    return found


DEFENSE = Defense(
    "nlsr",
    "restore the safety-critical neurons that the training changed",
    Options,
    needs=frozenset({"adapter", "safe rows", "base model"}),
    hooks=hooks,
    check=check,
)
