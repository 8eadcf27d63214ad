"""The proxy safety score S, and its gradient as exact low-rank factors.

∇_W S of a Linear is Σ_t b_t a_tᵀ over the probe's tokens, so its rank is at most their number. Kept are the factors,
never the matrix; many probes are averaged by stacking factors, and recompressed.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from gradshield.base.errors import UserError
from gradshield.data.encode import encode_request
from gradshield.models.batching import map_by_length, pad_right
from gradshield.models.experts import Expert
from gradshield.models.hooks import gradients_from, linear_hooks, logits_at
from gradshield.models.load import Model, device_of

R = TypeVar("R")
SafetyScore = Callable[[Tensor], Tensor]  # logits [..., vocabulary] → S [...], higher is safer


@dataclass(frozen=True)
class Factors:
    """A sum of rank-one matrices: G = outᵀ inp, with inp [rank, d_in] and out [rank, d_out]."""

    inp: Tensor
    out: Tensor

    def dense(self) -> Tensor:
        """G [d_out, d_in]. For tests and for preparing a probe's gradient; scoring never forms it."""
        return self.out.T @ self.inp


@dataclass(frozen=True)
class ProbeGradient:
    """∇_W S, averaged over probes, module by module."""

    factors: Mapping[str, Factors]

    @property
    def rank(self) -> int:
        """The largest rank of a module's factors."""
        return max(f.inp.shape[0] for f in self.factors.values())


def margin(safe: Sequence[int], unsafe: Sequence[int]) -> SafetyScore:
    """S = logsumexp over the safe token ids − logsumexp over the unsafe ones; eq. 5 with one id each."""

    def score(logits: Tensor) -> Tensor:
        values = logits.float()
        return values[..., list(safe)].logsumexp(-1) - values[..., list(unsafe)].logsumexp(-1)

    return score


def paper_tokens(tokenizer) -> tuple[int, int]:
    """Ids of "I" and "Sure" as first response tokens (eq. 5): the form that this tokenizer makes one token of, else the
    word's first token. Raises UserError when both words begin with the same one."""
    ids = []
    for word in ("I", "Sure"):
        forms = [tokenizer.encode(form, add_special_tokens=False) for form in (word, " " + word)]
        single = [form[-1] for form in forms if len(form) == 1 or tokenizer.decode(form[:-1]).strip() == ""]
        ids.append(single[0] if single else forms[0][0])
    if ids[0] == ids[1]:
        raise UserError('"I" and "Sure" begin with the same token in this tokenizer, so S is not defined')
    return ids[0], ids[1]


def own_tokens(model: Model, refused: Sequence[str], harmless: Sequence[str]) -> tuple[list[int], list[int]]:
    """(safe ids, unsafe ids): first tokens that this model prefers for refused requests, and those for harmless ones.

    A token counts when it holds at least 5 % (safe) or 1 % (unsafe) of the mean probability and four times the other
    side's. Raises UserError when the model has no refusing token of its own.
    """
    refusing = first_logits(model, refused).softmax(-1).mean(0)
    complying = first_logits(model, harmless).softmax(-1).mean(0)
    safe = ((refusing > 0.05) & (refusing > 4 * complying)).nonzero().flatten().tolist()
    unsafe = ((complying > 0.01) & (complying > 4 * refusing)).nonzero().flatten().tolist()
    if not safe or not unsafe:
        raise UserError(f"{model.name}: refusals and answers begin with the same tokens; use --scorer fihs:s=paper")
    return safe, unsafe


@torch.no_grad()
def first_logits(model: Model, requests: Sequence[str]) -> Tensor:
    """Logits [N, vocabulary] of the first response token for every request, float32 on the CPU."""
    return torch.stack(_map_requests(model, requests, lambda batch: _last_logits(model, batch).float().cpu()))


def _map_requests(model: Model, requests: Sequence[str], run: Callable[[list[np.ndarray]], Iterable[R]]) -> list[R]:
    """`run` on the requests' token ids, in batches of like length; its results in the order of the requests."""
    encoded = [encode_request(request, model.tokenizer) for request in requests]
    lengths = [len(ids) for ids in encoded]

    def chosen(batch: Sequence[int]) -> Iterable[R]:
        return run([encoded[n] for n in batch])

    return map_by_length(chosen, lengths, model.batch_tokens, item="request", fix="use --quantize")


def _last_logits(model: Model, batch: Sequence[np.ndarray]) -> Tensor:
    """Logits [B, vocabulary] behind the last token of each row of ids."""
    last = torch.tensor([len(ids) - 1 for ids in batch])
    return logits_at(model, pad_right(batch).to(model.device), torch.arange(len(batch)), last)


def probe_gradient(
    model: Model, requests: Sequence[str], score: SafetyScore, *, tolerance: float | None = None
) -> ProbeGradient:
    """Mean of ∇_W S over `requests`, as factors per module.

    `tolerance` bounds the relative Frobenius error of every module's recompressed gradient; 0 keeps every term. The
    default is 1 %, and 3 % for more than 16 probes. Scores of the embedded model move by 3e-5 and 2e-4 of the largest.
    With 3 %, 64 probes cost 1.07 times as much as one (docs/results/levers).
    """
    if tolerance is None:
        tolerance = 1e-2 if len(requests) <= 16 else 3e-2
    each = probe_gradients(model, requests, score)
    factors = {}
    for name in model.linears:
        inp, out = (torch.cat([getattr(g.factors[name], side) for g in each]).float() for side in ("inp", "out"))
        found = Factors(inp, out / len(requests))
        factors[name] = compress(found, tolerance) if tolerance and len(inp) else found
    return ProbeGradient(factors)


def probe_gradients(model: Model, requests: Sequence[str], score: SafetyScore) -> list[ProbeGradient]:
    """∇_W S at each request, every term kept, in the order of the requests and in the model's own precision.

    Requests of like length share one forward and one backward pass. Raises UserError for a model without Linears, and
    where they give no gradient or one that is not finite.
    """
    if not model.linears:
        raise UserError(f"{model.name}: no Linear layer with a gradient was found: use --scorer intent")

    def gradients(batch: list[np.ndarray]) -> list[ProbeGradient]:
        passes: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in model.linears}  # (x, δ) [B, T, d]
        with (
            linear_hooks(model.linears, lambda _name, x: x, lambda name, x, delta: passes[name].append((x, delta))),
            gradients_from(model),
        ):
            score(_last_logits(model, batch)).sum().backward()
        if not any(passes.values()):  # as of kernels that know none
            raise UserError(
                f"{model.name}: its Linear layers give no gradient: use --scorer intent, or load it unquantised"
            )
        if not all(x.isfinite().all() and delta.isfinite().all() for of in passes.values() for x, delta in of):
            raise UserError(f"{model.name}: the gradient of S is not finite: try --dtype float32 or bfloat16")
        return [
            ProbeGradient({name: _row_factors(model.linears[name], of, row, len(ids)) for name, of in passes.items()})
            for row, ids in enumerate(batch)
        ]

    return _map_requests(model, requests, gradients)


def _row_factors(module: Any, passes: Sequence[tuple[Tensor, Tensor]], row: int, length: int) -> Factors:
    """The factors of one row of the batch from its x and δ, without the padding behind its `length` tokens."""
    inputs, outputs = ([each[side][row, :length] for each in passes] for side in (0, 1))
    if isinstance(module, Expert):  # padding is routed, too, behind the row's own tokens; its δ is zero
        own = [delta.any(-1) for delta in outputs]
        inputs, outputs = ([v[kept] for v, kept in zip(of, own)] for of in (inputs, outputs))
    if not inputs:  # no token of the batch is routed to it, or nothing calls it: zero, so rank 0
        return zero_factors(module)
    if len(inputs) == 1:  # as it is: several Linears share their input
        return Factors(inputs[0], outputs[0])
    return Factors(torch.cat(inputs), torch.cat(outputs))


def zero_factors(module: Any) -> Factors:
    """A gradient of zero, of rank 0, for a Linear, however its weight is packed, a Conv1D or an expert."""
    if isinstance(module, Expert):
        (d_out, d_in), device = module.shape, device_of(module.module, module.stacked)
    elif hasattr(module, "in_features"):
        d_out, d_in, device = module.out_features, module.in_features, device_of(module, module.weight)
    else:
        d_in, d_out = module.weight.shape
        device = device_of(module, module.weight)
    return Factors(torch.zeros(0, d_in, device=device), torch.zeros(0, d_out, device=device))


def inner(one: ProbeGradient, other: ProbeGradient) -> float:
    """⟨one, other⟩ over all modules, from the factors: tr(outᵀ inp inp'ᵀ out') = Σ (out out'ᵀ) ∘ (inp inp'ᵀ)."""
    pairs = ((f, other.factors[name]) for name, f in one.factors.items())
    return sum(float(((f.out.float() @ g.out.float().T) * (f.inp.float() @ g.inp.float().T)).sum()) for f, g in pairs)


def minus(one: ProbeGradient, other: ProbeGradient, times: float = 1.0) -> ProbeGradient:
    """one − times · other, by stacking factors. With times = ⟨one, other⟩ / ⟨other, other⟩: the part of `one` that is
    orthogonal to `other`."""
    return ProbeGradient(
        {
            name: Factors(
                torch.cat([f.inp, other.factors[name].inp]), torch.cat([f.out, -times * other.factors[name].out])
            )
            for name, f in one.factors.items()
        }
    )


def lora_inputs(gradient: ProbeGradient, rank: int = 8, seed: int = 0) -> dict[str, Tensor]:
    """A [rank, d_in] of each module as PEFT draws it, for FIHS over a LoRA adapter's weights.

    At the start B = 0, so only B has a gradient, (∇_W L) Aᵀ: FIHS over B is the contraction with x replaced by A x.
    """
    result = {}
    for index, (name, f) in enumerate(gradient.factors.items()):
        generator = torch.Generator().manual_seed(seed * 100_003 + index)
        width = f.inp.shape[1]
        drawn = (2 * torch.rand(rank, width, generator=generator) - 1) / width**0.5  # Kaiming uniform with a = √5
        result[name] = drawn.to(f.inp)
    return result


def within_lora(gradient: ProbeGradient, inputs: Mapping[str, Tensor]) -> ProbeGradient:
    """The gradient as seen from LoRA's B: ⟨(∇L) Aᵀ, (∇S) Aᵀ⟩ = ⟨∇L, (∇S) AᵀA⟩."""
    return ProbeGradient(
        {name: Factors(f.inp @ inputs[name].T @ inputs[name], f.out) for name, f in gradient.factors.items()}
    )


def compress(factors: Factors, tolerance: float) -> Factors:
    """The same matrix with the fewest terms: its projection onto its own foremost singular vectors.

    Terms below `tolerance` of the Frobenius norm are dropped. The vectors are eigenvectors of a Gram matrix in float64.
    That loses nothing here, and is four times as fast as an SVD on a GPU.
    """
    if factors.out.shape[1] < factors.inp.shape[1]:  # the narrower side has the smaller Gram matrix
        turned = compress(Factors(factors.out, factors.inp), tolerance)
        return Factors(turned.out, turned.inp)
    basis, rest = torch.linalg.qr(factors.inp.T)  # [d_in, k], [k, rank]
    image = factors.out.T @ rest.T  # G basis [d_out, k]
    wide = (image.cpu() if image.device.type == "mps" else image).double()  # which knows no float64
    energy, vectors = torch.linalg.eigh(wide.T @ wide)  # ascending
    tail = energy.clamp_min(0).cumsum(0).sqrt()  # norm of what dropping up to here loses
    kept = tail > max(tolerance, torch.finfo(image.dtype).eps) * tail[-1]
    kept[-1] = True
    vectors = vectors[:, kept].to(image)
    return Factors((basis @ vectors).T.contiguous(), (image @ vectors).T.contiguous())
