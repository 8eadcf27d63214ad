"""`muli`: log-odds that the request is toxic, from the first response token's logits.

Source: Hu et al., Toxicity Detection for Free (2405.18822), and their code.

    x = log p − log(1 − p) of every token as the first one, standardised;  score(z) = w·x + b
    w, b = argmin of the class-balanced logistic loss + λ (‖w‖₁ + |b|), λ = 1e-3

The authors fit on the training half of ToxicChat, about 5,000 prompts with human labels, by SGD. Here the bundled
requests are the data, and an accelerated proximal gradient finds the optimum, with exact zeros. A row of
several turns has the score of its highest. It reads requests only, so a refusal of a harmful request scores as high as
an answer to it.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from gradshield.base.progress import progress
from gradshield.base.registry import NoOptions
from gradshield.data.encode import Example
from gradshield.models.batching import pad_right
from gradshield.models.hooks import logits_at
from gradshield.models.load import Model
from gradshield.scoring.base import Context, Prepared, Scorer
from gradshield.scoring.bundled_requests import harmless_requests, requests_to_refuse
from gradshield.scoring.fihs.probe import first_logits

AT_ONCE = 64  # requests between two signs of progress
STEPS = 2000  # of FISTA


class MuliOptions(NoOptions):
    """The paper's setting is the default."""

    penalty: float = Field(default=1e-3, ge=0, description="weight of the L1 norm, λ")


def prepare(context: Context, options: MuliOptions) -> Prepared:
    """Fits the sparse logistic regression; cached per model."""
    model = context.model

    def fit() -> dict[str, np.ndarray]:
        kinds = (requests_to_refuse(context.probes), harmless_requests())
        parts = [features(_logits(model, requests)) for requests in kinds]
        toxic = torch.repeat_interleave(torch.tensor([1.0, 0.0]), torch.tensor([len(part) for part in parts]))
        weight, bias = sparse_logistic(torch.cat(parts), toxic, options.penalty)
        return {"weight": weight.numpy(), "bias": bias.numpy()}

    fitted = {name: torch.from_numpy(value) for name, value in context.cached("fit", fit).items()}

    @torch.no_grad()
    def score(batch: Sequence[Example]) -> Mapping[str, np.ndarray]:
        starts = [np.flatnonzero(np.diff(e.mask.astype(int)) == 1) for e in batch]  # the token in front of a response
        owner = np.repeat(np.arange(len(batch)), [len(s) for s in starts])
        ids = pad_right([example.ids for example in batch])
        at = torch.from_numpy(np.concatenate(starts))
        logits = logits_at(model, ids.to(model.device), torch.from_numpy(owner).to(model.device), at.to(model.device))
        odds = (features(logits.cpu()) @ fitted["weight"] + fitted["bias"]).double().numpy()
        return {"score": np.maximum.reduceat(odds, np.searchsorted(owner, np.arange(len(batch))))}

    return Prepared(score)


def _logits(model: Model, requests: Sequence[str]) -> Tensor:
    found = []
    with progress("muli: reading requests", 0, len(requests), unit="requests") as advance:
        for n in range(0, len(requests), AT_ONCE):
            part = requests[n : n + AT_ONCE]
            found.append(first_logits(model, part))
            advance(0, len(part))
    return torch.cat(found)


def features(logits: Tensor) -> Tensor:
    """log p − log(1 − p) [N, vocabulary] of logits [N, vocabulary], with probabilities off 0 and 1 as in the paper."""
    p = logits.float().softmax(-1)
    return p.clamp_min(1e-16).log() - (1 - p).clamp_min(1e-16).log()


def sparse_logistic(x: Tensor, y: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """(w [d], b []) for unstandardised x [N, d] and y [N] in {0, 1}, by FISTA on standardised x."""
    mean, std = x.mean(0), x.std(0)
    varies = std > 1e-10
    x = torch.where(varies, (x - mean) / torch.where(varies, std, 1.0), 0.0)
    weight = torch.where(y == 1, (1 - y).sum() / y.sum(), 1.0) / len(y)  # positives count as much as negatives
    x1 = torch.cat([x, torch.ones(len(x), 1)], 1)
    weighted = x1 * weight.sqrt()[:, None]
    steepest = torch.linalg.eigvalsh(weighted @ weighted.T)[-1]  # [N, N]: the vocabulary is the longer side
    step = 4 / float(steepest * 1.0001 + 1e-12)
    w = v = torch.zeros(x1.shape[1])
    t = 1.0
    with progress("muli: fitting", 0, STEPS, unit="steps") as advance:
        for _ in range(STEPS):
            moved = v - step * (x1.T @ (weight * ((x1 @ v).sigmoid() - y)))
            after = moved.sign() * (moved.abs() - step * penalty).clamp_min(0)
            t, before = (1 + (1 + 4 * t * t) ** 0.5) / 2, t
            v = after + (before - 1) / t * (after - w)
            done = float((after - w).abs().max()) < 1e-7
            w = after
            advance(0, 1)
            if done:
                break
    scaled = torch.where(varies, w[:-1] / torch.where(varies, std, 1.0), 0.0)
    return scaled, w[-1] - scaled @ mean


SCORER = Scorer(
    "muli",
    "log-odds of a toxic request from the first token's logits (2405.18822)",
    prepare,
    options=MuliOptions,
    needs=frozenset({"refused probes", "request"}),
    cost=1.0,
)
