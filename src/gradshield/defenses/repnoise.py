"""`repnoise`: align so that hidden states of harmful answers are noise, which no later training can build on.

Source: Rosati et al., Representation Noising: A Defence Mechanism Against Harmful Finetuning (2405.14577), and the
authors' code.

    L = L_alignment + β mean_l MMD(Z_l, N(0, I)) − α log(1 + mean_l CE_l(harmful answer))

Z_l are the outputs of block l's MLP at the tokens of harmful answers. CE_l is the cross-entropy of the head on the
states behind block l, so that every layer unlearns the answer. MMD sums five Gaussian kernels.

α and β are the code's. There, MMD compares whole rows, padded; here tokens, so that rows of unlike length can be
compared. The code adds the loss of the answer to that of the head on the embeddings and on the states behind all L
blocks, L + 2 terms, and divides by L + 1. Here it is the mean of the L terms behind the blocks. The harmful rows are
the bundled anchors, and the alignment's own rows take the place of paired refusals.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from gradshield.base.registry import NoOptions
from gradshield.defenses.base import Defense, DefenseContext
from gradshield.defenses.vaccine import outputs_of
from gradshield.training.batches import draw_batches
from gradshield.training.interventions import Batch, Hooks

KERNELS = (0.25, 0.5, 1.0, 2.0, 4.0)  # bandwidths, in mean squared distances


class Options(NoOptions):
    """Options of `repnoise`."""

    noise: float = Field(default=0.001, ge=0, description="weight of the distance to noise, β")
    ascent: float = Field(default=1.0, ge=0, description="weight of the harmful loss, which rises, α")
    harmful: int = Field(default=4, ge=1, description="harmful rows in a step")


def mmd(one: Tensor, other: Tensor) -> Tensor:
    """Squared maximum mean discrepancy of two samples [n, d] of one size; 0 for the same sample."""
    both = torch.cat([one, other])
    distances = (both[:, None] - both[None]).square().sum(2)  # [2n, 2n]
    mean = distances.detach().sum() / (len(both) * (len(both) - 1))
    kernel = torch.stack([torch.exp(-distances / (mean * width).clamp_min(1e-12)) for width in KERNELS]).sum(0)
    n = len(one)
    return (kernel[:n, :n] + kernel[n:, n:] - kernel[:n, n:] - kernel[n:, :n]).mean()


def noise_distance(states: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    """Mean MMD of each layer's states [tokens, d] to standard normal noise."""
    drawn_noise = [torch.randn(z.shape, generator=generator).to(z) for z in states]
    return torch.stack([mmd(z, noise) for z, noise in zip(states, drawn_noise)]).mean()


def harmful_terms(net: Any, blocks: Sequence[nn.Module], batch: Batch, generator: torch.Generator) -> tuple[Any, Any]:
    """(mean over layers of MMD to noise, mean over layers of the answer's cross-entropy) of a harmful batch."""
    labels = batch["labels"]
    answer, predicts = labels != -100, (labels != -100).roll(-1, 1)
    mlp: dict[int, Tensor] = {}

    def keep(number: int, state: Tensor) -> Tensor:
        mlp[number] = state
        return state

    with outputs_of([block.get_submodule("mlp") for block in blocks], keep):
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        found = net(**inputs, output_hidden_states=True, use_cache=False)
    own = net.get_base_model()
    head, norm = own.get_output_embeddings(), own.get_decoder().norm
    behind = [head(norm(state[predicts])) for state in found.hidden_states[1:-1]]
    logits = [*behind, found.logits[predicts]]
    entropies = [nn.functional.cross_entropy(each.float(), labels[answer]) for each in logits]
    states = [mlp[n][answer].float() for n in range(len(blocks))]
    return noise_distance(states, generator), torch.stack(entropies).mean()


def align_hooks(context: DefenseContext, options: Options) -> Hooks:
    """Adds the harmful terms to the alignment's loss."""
    model, seed = context.model, context.training.seed
    draw = draw_batches(context.anchors["harmful"], seed, model.device)

    def loss(net: nn.Module, batch: Batch, loss_of: Callable[[Batch], Tensor], step: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        distance, entropy = harmful_terms(net, model.layers, draw(step, options.harmful), generator)
        added = options.noise * distance - options.ascent * torch.log1p(entropy)
        return loss_of(batch) + added * len(batch["index"]) / batch["step_rows"]

    return Hooks(loss=loss)


DEFENSE = Defense(
    "repnoise",
    "align so that hidden states of harmful answers are noise",
    Options,
    needs=frozenset({"alignment recipe", "harmful rows"}),
    cost=3.0,
    align_hooks=align_hooks,
)
