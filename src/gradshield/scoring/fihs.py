"""FIHS in its variants, as scorers: the paper's raw dot, and normalised ones that short answers do not break (5b)."""

from collections.abc import Mapping, Sequence
from math import inf, log2

import numpy as np
import torch

from gradshield.data.encode import Example
from gradshield.errors import out_of_memory
from gradshield.model import Model
from gradshield.probe import Factors, ProbeGradient, lora_inputs, within_lora
from gradshield.scoring.contraction import contract, directions
from gradshield.scoring.run import Scorer

VARIANTS = ("paper", "cosine", "module")
DIRECTIONS = 16  # random rank-one directions for the norms
READING = 3  # goes up when scores of the same row change, so that anchors scored before are not used any more


def fihs_scorer(model: Model, probe: ProbeGradient, variant: str, *, lora: bool = False) -> Scorer:
    """A scorer with the columns "score", "loss", and every variant that the pass yields.

    `paper`: ⟨∇L, ∇S⟩ (eq. 4). `cosine`: divided by ‖∇L‖. `module`: the mean over modules (of experts, those that the
    row reaches) of each one's dot divided by its own ‖∇L_m‖. Both norms are estimated by random directions, the same
    for every row. With `lora`, all of it is over the weights of a LoRA adapter at its start instead. A row that does
    not fit into memory on its own is scored with its activations computed again.
    """
    inputs = lora_inputs(probe) if lora else None
    probe = within_lora(probe, inputs) if inputs else probe
    dtype = model.net.dtype  # as precise as what it is multiplied with; a GPU has no quick product of mixed precision
    scale = torch.tensor([_power(f.out) if dtype == torch.float16 else 1.0 for f in probe.factors.values()])
    factors = (
        (name, f.inp.to(dtype), f.out / power) for (name, f), power in zip(probe.factors.items(), scale.tolist())
    )
    probe = ProbeGradient({name: Factors(inp, out.to(dtype)) for name, inp, out in factors})
    random = directions(probe.factors, DIRECTIONS, within=inputs) if variant != "paper" else None
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
            columns["cosine"] = columns["paper"] / result.norms.sum(1).sqrt().clamp_min(tiny)
            reached = (result.norms > 0).sum(1).clamp_min(1)  # an expert that no token is routed to has no say
            columns["module"] = (dots / result.norms.sqrt().clamp_min(tiny)).sum(1) / reached
        return {name: c.double().numpy() for name, c in {"score": columns[variant], **columns}.items()}

    return scorer


def _power(values: torch.Tensor) -> float:
    """The power of two near the largest of the values, by which float16 holds them without underflow."""
    largest = float(values.abs().max()) if values.numel() else 0.0
    return 2.0 ** round(log2(largest)) if 0 < largest < inf else 1.0
