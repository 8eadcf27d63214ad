"""`salora`: a LoRA adapter whose output stays out of the directions that matter for safety.

Source: Li et al., SaLoRA (2501.01765), section 4. For each Linear W with an adapter, X_h its inputs at the answers of
safe rows, and X_t those of the user's rows:

    y = W x + s C (B A − B_0 A_0) x,   C = I − U_C U_Cᵀ,   U_C: the first r_s left singular vectors of W X_h
    B_0 = U Uᵀ Ū √(S̄/s),   A_0 = √(S̄/s) V̄ᵀ     U: the first r_t of W X_t,   Ū S̄ V̄ᵀ: the first r of W

C is fixed, and B A starts at B_0 A_0, so the model starts as it was. The paper subtracts C B_0 A_0 from W; here it is
subtracted from the output, which is the same. s is LoRA's scale, 1 in the paper. What is saved is an adapter of rank
2r, [C B, −C B_0] and [A; A_0], that PEFT loads like any other. r_s and r_t are 32, and at most half of a layer's width.
As in the authors' code (homles11/SaLoRA, lora_train_act.py), 128 rows of either kind are read; here, 256 tokens of them
at even distances.

The authors' setting is rank 16 and alpha 16 (s = 1), a learning rate of 1e-4, q_proj and v_proj, and benign user data.
GradShield's LoRA has rank 8 and alpha 32 (s = 4) on all linear layers. Its study of defenses has a rate of 5e-4 and a
file with harmful rows. There, a start at singular vectors makes much larger steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from gradshield.base.errors import UserError
from gradshield.data.encode import Example
from gradshield.defenses.base import Defense, DefenseContext
from gradshield.defenses.registry import SafeRows
from gradshield.scoring.inputs import read_inputs
from gradshield.training.interventions import Hooks
from gradshield.training.lora import LoraLayer, lora_layers

TOKENS = 256  # read for each layer
OVERSAMPLING, ITERATIONS = 8, 4  # of the randomised SVD: vectors beyond those wanted, power iterations


class Options(SafeRows):
    """The subspaces."""

    count: int = Field(default=128, ge=1, description="number of safe rows to read, and of the user's rows")
    safety_rank: int = Field(default=32, ge=1, description="output directions kept for safety, r_s")
    task_rank: int = Field(
        default=32, ge=1, description="output directions of the user's rows in which the adapter starts, r_t"
    )


@dataclass(frozen=True)
class Fixed:
    """What training does not change in one layer."""

    safety: Tensor  # U_C [d_out, r_s]
    b: Tensor  # C B_0 [d_out, r]
    a: Tensor  # A_0 [r, d_in]


def check(context: DefenseContext, options: Options) -> None:
    """Raises UserError for quantised weights."""
    if context.settings.quantize:
        raise UserError("--defense salora needs the weights' singular vectors: leave out --quantize")


def hooks(context: DefenseContext, options: Options) -> Hooks:
    """The start and the projection of every LoRA layer."""
    fixed: dict[str, Fixed] = {}
    state: dict[str, Tensor] = {}

    def adapt(net: Any) -> None:
        layers = list(lora_layers(net))
        stride = max(1, len(context.examples) // options.count)
        safe = read_inputs_of(context, layers, context.safe_rows(options))
        user = read_inputs_of(context, layers, context.examples[::stride][: options.count])
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(context.training.seed)
            for layer, harmful, own in zip(layers, safe, user, strict=True):
                weight = layer.weight.float()
                safety = left_singular_vectors(weight @ harmful.T, options.safety_rank)
                b, a = initial_factors(
                    weight, left_singular_vectors(weight @ own.T, options.task_rank), len(layer.a.weight), layer.scale
                )
                layer.b.weight.copy_(b)
                layer.a.weight.copy_(a)
                fixed[layer.name] = Fixed(safety, apply_projection(safety, b), a)
                state.update({f"{layer.name}.{part}": value for part, value in vars(fixed[layer.name]).items()})
                add_projected_adapter(layer, fixed[layer.name])

    def finish(net: Any) -> None:
        for layer in lora_layers(net):
            b, a = as_plain_lora(layer, fixed[layer.name])
            layer.b.weight, layer.a.weight = nn.Parameter(b), nn.Parameter(a)
        config = net.peft_config["default"]
        config.r, config.lora_alpha = 2 * config.r, 2 * config.lora_alpha

    return Hooks(adapt=adapt, finish=finish, state=state)


def read_inputs_of(context: DefenseContext, layers: Sequence[LoraLayer], rows: Sequence[Example]) -> list[Tensor]:
    """The inputs of each layer at `TOKENS` response tokens of the rows, about [TOKENS, d_in]."""
    stride = max(1, sum(int(e.mask.sum()) for e in rows) // TOKENS)
    found: list[list[Tensor]] = [[] for _ in layers]
    linears = [layer.linear for layer in layers]
    tokens = context.model.batch_tokens
    read_inputs(context.model, linears, rows, tokens, lambda n, x: found[n].append(x[::stride]), responses=True)
    return [torch.cat(parts) for parts in found]


def left_singular_vectors(outputs: Tensor, rank: int) -> Tensor:
    """The first left singular vectors [d_out, rank] of outputs [d_out, tokens]; at most half of d_out, and as many as
    there are tokens."""
    rank = min(rank, len(outputs) // 2, outputs.shape[1])
    size = min(rank + OVERSAMPLING, *outputs.shape)
    return torch.svd_lowrank(outputs, size, ITERATIONS)[0][:, :rank].contiguous()


def initial_factors(weight: Tensor, task: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """(B_0 [d_out, rank], A_0 [rank, d_in]) of W [d_out, d_in] and U [d_out, r_t]."""
    left, values, right = torch.svd_lowrank(weight, min(rank + OVERSAMPLING, *weight.shape), ITERATIONS)
    root = (values[:rank] / scale).sqrt()
    return task @ (task.T @ left[:, :rank]) * root, (right[:, :rank] * root).T.contiguous()


def apply_projection(safety: Tensor, values: Tensor) -> Tensor:
    """C values, of values [d_out, any]."""
    return values - safety @ (safety.T @ values)


def add_projected_adapter(layer: LoraLayer, fixed: Fixed) -> None:
    """Makes the layer add s C (B A − B_0 A_0) x."""
    given: list[Tensor] = []

    def remember(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        given[:] = args

    def project(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        safety, b, a = (part.to(output.dtype) for part in (fixed.safety, fixed.b, fixed.a))
        x = given.pop().to(output.dtype)
        return output - (output @ safety) @ safety.T - (x @ a.T) @ b.T

    layer.a.register_forward_pre_hook(remember)
    layer.b.register_forward_hook(project)


def as_plain_lora(layer: LoraLayer, fixed: Fixed) -> tuple[Tensor, Tensor]:
    """(B [d_out, 2r], A [2r, d_in]) of a plain LoRA layer that adds the same."""
    b, a = layer.b.weight, layer.a.weight
    return torch.cat([apply_projection(fixed.safety, b), -fixed.b.to(b)], 1), torch.cat([a, fixed.a.to(a)])


DEFENSE = Defense(
    "salora",
    "keep the adapter's output out of the safety directions (2501.01765)",
    Options,
    needs=frozenset({"adapter", "safe rows"}),
    cost=1.1,
    hooks=hooks,
    check=check,
)
