"""`constrained-sft`: learn a token the less, the further the model has already moved on it; least at an answer's start.

Source: Qi et al., Safety Alignment Should Be Made More Than Just a Few Tokens Deep (2406.05946), section 4, and the
authors' code. For the t-th token of an answer

    L = mean over tokens of −2/β_t log σ(β_t log(π(y_t)/π_ref(y_t))),   ∇L = mean of w_t ∇ CE_t
    w_t = 2 (1 − σ(β_t (log π(y_t) − log π_ref(y_t))))

π_ref is the model before training. w_t is 1 at the start, and goes to 0 as the token becomes likelier than under π_ref:
the faster, the larger β_t, which is 0.5 for the first token, 2 for the second to fifth, and 0.1 for the rest. As in the
authors' code, the cross-entropy is multiplied by w_t as a constant, no less than 0.001. The paper has one answer per
row; here t starts again at every answer of a conversation.
"""

from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor, nn

from gradshield.base.registry import NoOptions
from gradshield.defenses.base import Defense, DefenseContext
from gradshield.training.batches import log_probs, remembered_start
from gradshield.training.interventions import Batch, Hooks

MIN_WEIGHT = 1e-3


class Options(NoOptions):
    """β by place in the answer."""

    first: float = Field(default=0.5, gt=0, description="β of an answer's first token")
    early: float = Field(default=2.0, gt=0, description="β of its second token to the one at `length`")
    late: float = Field(default=0.1, gt=0, description="β of the tokens after these")
    length: int = Field(default=5, ge=1, description="tokens that count as early, the first one among them")


def hooks(context: DefenseContext, options: Options) -> Hooks:
    """The weighted cross-entropy."""
    adapt, start = remembered_start()

    def loss(net: nn.Module, batch: Batch, loss_of: Callable[[Batch], Tensor], step: int) -> Tensor:
        with start() as reference, torch.no_grad():
            before = log_probs(reference, batch)
        now = log_probs(net, batch)
        weights = token_weights(now.detach(), before, betas(batch["labels"], options).to(now.device))
        return -(weights * now).sum() / batch["step_tokens"]

    return Hooks(adapt=adapt, loss=loss)


def token_weights(now: Tensor, before: Tensor, beta: Tensor) -> Tensor:
    """w_t of each token, from its log probabilities under π and π_ref."""
    return (2 * (1 - torch.sigmoid(beta * (now - before)))).clamp_min(MIN_WEIGHT)


def betas(labels: Tensor, options: Options) -> Tensor:
    """β of each labelled token [labelled], row by row."""
    labelled = labels[:, 1:] != -100  # the first token of a row is never labelled
    count = labelled.cumsum(1)
    place = count - torch.where(labelled, 0, count).cummax(1).values  # from 1 in each answer
    early = torch.where(place == 1, options.first, options.early)
    return torch.where(place <= options.length, early, options.late)[labelled]


DEFENSE = Defense(
    "constrained-sft",
    "hold back tokens that already moved, most at an answer's start (2406.05946)",
    Options,
    cost=1.3,
    hooks=hooks,
)
