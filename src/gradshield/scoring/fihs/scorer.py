"""FIHS in its variants, as scorers: the paper's raw dot, and normalised ones that short answers do not break (5b)."""

from collections.abc import Mapping, Sequence
from math import inf, log2

import numpy as np
import torch

from gradshield.base.errors import out_of_memory
from gradshield.data.encode import Example
from gradshield.models.load import Model
from gradshield.scoring.base import ScoreFunction
from gradshield.scoring.fihs.contraction import contract, random_directions
from gradshield.scoring.fihs.probe import Factors, ProbeGradient, lora_inputs, within_lora

DIRECTIONS = 16  # random rank-one directions for the norms


def fihs_scorer(model: Model, probe: ProbeGradient, variant: str, *, lora: bool = False) -> ScoreFunction:
    """A scorer with the columns "score", "loss", and every variant that the pass yields.

    `paper`: ⟨∇L, ∇S⟩ (eq. 4). `cosine`: divided by ‖∇L‖. `module`: the mean over modules (of experts, those that the
    row reaches) of each one's dot divided by its own ‖∇L_m‖. Both norms are estimated by random directions, the same
    for every row. With `lora`, all of it is over the weights of a LoRA adapter at its start instead. A row that does
    not fit into memory on its own is scored with its activations computed again.
    """
    inputs = lora_inputs(probe) if lora else None
    probe = within_lora(probe, inputs) if inputs else probe
    dtype = model.net.dtype  # as precise as what it is multiplied with; a GPU has no quick product of mixed precision
    narrow = dtype == torch.float16  # where what is large must not meet what is large
    factors = {name: _balanced(f) if narrow else f for name, f in probe.factors.items()}
    scale = torch.tensor([_power(f.out) if narrow else 1.0 for f in factors.values()])
    probe = ProbeGradient(
        {
            name: Factors(f.inp.to(dtype), (f.out / power).to(dtype))
            for (name, f), power in zip(factors.items(), scale.tolist())
        }
    )
    random = random_directions(probe.factors, DIRECTIONS, within=inputs) if variant != "paper" else None
    width = torch.ones(len(factors))
    if random and narrow:
        width = torch.tensor([4.0 ** round(log2(v.shape[1]) / 2) for v, _ in random.values()])
        random = {name: (v / w**0.5, u) for (name, (v, u)), w in zip(random.items(), width.tolist())}
    tiny = torch.finfo(torch.float32).tiny

    def scorer(batch: Sequence[Example]) -> Mapping[str, np.ndarray]:
        try:
            result = contract(model, batch, probe, random)
        except (RuntimeError, MemoryError) as error:
            if len(batch) > 1 or not out_of_memory(error):  # larger batches are halved
                raise
            result = None
        if result is None:  # outside of except, whose traceback keeps the tensors alive
            result = contract(model, batch, probe, random, recompute=True)
        dots = result.dots * scale
        columns = {"paper": dots.sum(1), "loss": result.loss}
        if result.norms is not None:
            norms = result.norms * width
            norms = norms.where(norms.isfinite(), torch.nan)  # or a finite score over an infinite norm would be 0
            columns["cosine"] = columns["paper"] / norms.sum(1).sqrt().clamp_min(tiny)
            reached = (norms > 0).sum(1).clamp_min(1)  # an expert that no token is routed to is ignored
            columns["module"] = (dots / norms.sqrt().clamp_min(tiny)).sum(1) / reached
        return {name: c.double().numpy() for name, c in {"score": columns[variant], **columns}.items()}

    return scorer


def _balanced(factors: Factors) -> Factors:
    """The same matrix with rows of unit length in `inp`, so that all that is large is in `out`."""
    length = factors.inp.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return Factors(factors.inp / length, factors.out * length)


def _power(values: torch.Tensor) -> float:
    """The power of two near the largest of the values, by which float16 holds them without underflow."""
    largest = float(values.abs().max()) if values.numel() else 0.0
    return 2.0 ** round(log2(largest)) if 0 < largest < inf else 1.0
