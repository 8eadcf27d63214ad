"""Inputs and output gradients of Linears in one forward and one backward, and logits only where they are read.

For y = W x the weight's gradient is Σ_t δ_t x_tᵀ, so a function of (x, δ) per token needs no weight gradient. With the
weights frozen, autograd saves no inputs: only what a hook computes from x in the forward pass is kept.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from gradshield.base.errors import UserError
from gradshield.models.experts import Expert, experts_one_by_one
from gradshield.models.load import Model

LOGITS = {
    "cpu": 2**23
}  # at once where a loss is made of them, and else 2**26, as a GPU is quick at large products only


@contextmanager
def linear_hooks(
    modules: Mapping[str, nn.Module | Expert],
    forward: Callable[[str, Tensor], Any],
    backward: Callable[[str, Any, Tensor], None],
    in_place: bool = False,
) -> Iterator[None]:
    """Context that calls `kept = forward(name, x)` with each module's input x [B, T, d_in] in the forward pass. In the
    backward pass it calls `backward(name, kept, δ)` with the output's gradient δ [B, T, d_out]. Tensors are detached.

    Of an expert, they get the tokens routed to it, moved to the left of their row and padded with zeros. Without such a
    token in the batch, they are not called. With `in_place`, tokens keep their positions and all else is zero.
    """
    plain = {name: module for name, module in modules.items() if not isinstance(module, Expert)}
    experts = {(id(m.module), m.projection, m.number): name for name, m in modules.items() if isinstance(m, Expert)}
    shape = (0, 0)  # B, T: attention, which sees tokens in their rows, comes before all that sees them in a line

    def watch(name: str, x: Tensor, output: Tensor, fold: Callable[[Tensor], Tensor]) -> None:
        if not isinstance(output, Tensor) or not output.requires_grad:
            return
        x = x.detach()
        if in_place:  # where an expert's x is mostly zeros: they are made when they are needed, one module at a time
            output.register_hook(lambda delta: backward(name, forward(name, fold(x)), fold(delta.detach())))
        else:
            kept = forward(name, fold(x))
            output.register_hook(lambda delta: backward(name, kept, fold(delta.detach())))

    def attach(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            nonlocal shape
            x = args[0]
            if x.ndim > 2 and shape == (0, 0):
                shape = (x.shape[0], x.shape[1])
            rows, length = shape
            if len(x) != (rows if x.ndim > 2 else rows * length):
                raise UserError(
                    f"{name} sees only some tokens of the batch: gradient scores don't work with such experts"
                )
            watch(name, x, output, lambda v: v.reshape(rows, -1, v.shape[-1]))

        return hook

    def tap(module: Any) -> Callable[[str, int, Tensor, Tensor, Tensor], None]:
        def call(projection: str, number: int, x: Tensor, y: Tensor, place: Tensor) -> None:
            name = experts.get((id(module), projection, number))
            if name is not None:
                watch(name, x, y, _folded(place, *shape, in_place))

        return call

    holders = {id(m.module): m.module for m in modules.values() if isinstance(m, Expert)}
    handles = [module.register_forward_hook(attach(name)) for name, module in plain.items()]
    try:
        with experts_one_by_one([(module, tap(module)) for module in holders.values()]):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _folded(place: Tensor, rows: int, length: int, in_place: bool) -> Callable[[Tensor], Tensor]:
    """A function that scatters values [n, d], of the places [n] (ascending) of a flattened batch, to [rows, T, d]."""
    row = place // length
    nth = torch.arange(len(place), device=place.device) - torch.searchsorted(row, row)  # of its row's tokens here
    column = place % length if in_place else nth
    width = length if in_place else int(nth.max()) + 1

    def fold(v: Tensor) -> Tensor:
        result = v.new_zeros(rows, width, v.shape[-1])
        result[row, column] = v
        return result

    return fold


@contextmanager
def gradients_from(model: Model, layer: int = 0, *, recompute: bool = False) -> Iterator[None]:
    """Context in which autograd tracks activations from decoder block `layer` upwards, although all weights are frozen.

    With `recompute`, blocks keep only their inputs and are computed again in the backward pass. That takes about half
    as much time again (docs/results/levers) for a fraction of the memory.
    """

    def followed(hidden: Tensor) -> Tensor:
        return hidden if hidden.requires_grad else hidden.detach().requires_grad_()  # the first of a loop's rounds

    def start(
        _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (followed(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": followed(kwargs["hidden_states"])}

    again = [block for block in model.layers if recompute or any(weight.is_meta for weight in block.parameters())]
    handle = model.layers[layer].register_forward_pre_hook(start, with_kwargs=True)
    try:
        with torch.enable_grad(), without_cudnn_attention(), _computed_again(again), _activations_again(model.layers):
            yield
    finally:
        handle.remove()


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Context in which attention does not use cuDNN. On Hopper GPUs torch prefers cuDNN, and with a mask its backward
    pass may give NaN (pytorch/pytorch#196678).
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@contextmanager
def _activations_again(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Recomputes activation outputs in the backward pass instead of saving them; the result is the same, bit for bit.

    Autograd saves an activation's input anyway. Of gate, up and silu(gate), a gated block then holds the first two.
    """
    kinds = ("torch.nn.modules.activation", "transformers.activations")
    functions = [m for block in blocks for m in block.modules() if type(m).__module__ in kinds and not [*m.children()]]
    latest: list[tuple[nn.Module, Tensor, Tensor]] = []  # held until it is kept, so that its address is no one else's

    def made(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad and output.data_ptr() != args[0].data_ptr():
            latest[:] = [(module, args[0].detach(), output.detach())]

    def pack(kept: Tensor) -> Tensor | tuple[nn.Module, Tensor]:
        if latest:
            module, given, output = latest[0]
            same = kept.data_ptr() == output.data_ptr() and kept.shape == output.shape
            if same and kept.stride() == output.stride() and not kept._version and not given._version:
                latest.clear()
                return module, given
        return kept.detach()  # or what an operation keeps of its own result would hold its graph when a pass fails

    def unpack(kept: Tensor | tuple[nn.Module, Tensor]) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        with torch.no_grad():
            return kept[0].forward(kept[1])

    handles = [module.register_forward_hook(made) for module in functions]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _computed_again(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Context in which each of these blocks keeps only its input and is computed again in the backward pass.

    If weights are offloaded, autograd would otherwise keep every weight that accelerate moved in, until all of them
    were in memory at once.
    """
    before = [(block, block.__dict__.get("forward")) for block in blocks]
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        with set_checkpoint_early_stop(False):  # stopped early, a module would not give its weights back
            yield
    finally:
        for block, forward in before:
            del block.forward
            if forward is not None:  # accelerate's
                block.forward = forward


def logits_at(model: Model, ids: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    """Logits [N, vocabulary] at (rows[n], positions[n]) of the batch ids [B, T]; no other logits are computed.

    Batches are padded on the right and the model is causal, so no token sees a pad and no attention mask is needed.
    Gathering in front of the head keeps whatever a model does behind it (scaling, soft caps).
    """

    def gather(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = args[0]  # [B, T, d]
        return (
            hidden[rows.to(hidden.device), positions.to(hidden.device)].unsqueeze(0),
            *args[1:],
        )  # [1, N, d]

    head = model.net.get_output_embeddings()
    handle = head.register_forward_pre_hook(gather)
    try:
        return model.net(input_ids=ids, use_cache=False).logits[0]
    finally:
        handle.remove()


def token_losses(model: Model, ids: Tensor, rows: Tensor, positions: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy [N] of the ids `targets` behind (rows[n], positions[n]) of the batch ids [B, T], in nats, detached;
    the backward pass of their sum is done when it returns.

    Logits are computed for some tokens at a time: those of all tokens can take more memory than the rest of the
    network. The decoder runs once. Then the rest of the model (head, scaling, soft caps) runs once per part, with the
    decoder replaced by its output at the part's tokens. (Not under FSDP, which supports one backward pass only.)
    """
    net = model.net.get_base_model() if hasattr(model.net, "get_base_model") else model.net
    decoder, vocabulary = _decoder(net), net.config.get_text_config().vocab_size
    parts = torch.arange(len(targets)).split(max(1, LOGITS.get(model.device.type, 2**26) // vocabulary))
    if len(parts) == 1 or decoder is net or _sharded(model.net):
        return _losses(logits_at(model, ids, rows, positions), targets)
    whole: list[Any] = []
    wanted: list[Tensor] = []

    def only(part: Tensor) -> Any:
        output, hidden = whole[0], whole[1]
        wanted.append(hidden.detach()[part.to(hidden.device)].unsqueeze(0).requires_grad_())
        if isinstance(output, tuple):
            return (wanted[-1], *output[1:])
        return type(output)(**{**output, "last_hidden_state": wanted[-1]})

    def first(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        hidden = output[0]  # [B, T, d]
        whole.extend([output, hidden[rows.to(hidden.device), positions.to(hidden.device)]])
        return only(parts[0])

    found = []
    for n, part in enumerate(parts):
        if n == 0:
            handle = decoder.register_forward_hook(first)
            try:
                logits = model.net(input_ids=ids, use_cache=False).logits[0]
            finally:
                handle.remove()
        else:
            with patch.object(decoder, "forward", lambda *_, part=part, **__: only(part)):
                logits = model.net(input_ids=ids[:1, : len(part)], use_cache=False).logits[0]
        found.append(_losses(logits, targets[part]))
        del logits
    whole[1].backward(torch.cat([w.grad[0] for w in wanted if w.grad is not None]))
    return torch.cat(found)


def _decoder(net: Any) -> nn.Module:
    """The part of the model in front of its head."""
    found = net.get_decoder() if hasattr(net, "get_decoder") else None
    return next((module for module in net.base_model.modules() if module is found), net.base_model)


def _sharded(net: nn.Module) -> bool:
    """True under FSDP, of the first kind or the second."""
    first = any(type(module).__name__ == "FullyShardedDataParallel" for module in net.modules())
    return first or any(hasattr(weight, "device_mesh") for weight in net.parameters())


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    losses = nn.functional.cross_entropy(logits.float(), targets.to(logits.device), reduction="none")
    losses.sum().backward()
    return losses.detach()


class _Reached(Exception):
    """Ends a forward pass at the requested block."""


@torch.no_grad()
def hidden_at(model: Model, ids: Tensor, layers: Sequence[int], shared: int = 0) -> list[Tensor]:
    """Outputs [B, T − shared, d] of the decoder blocks `layers` (ascending) for the batch ids [B, T], from position
    `shared` on; nothing above the last of them is computed.

    The first `shared` tokens must be the same in every row. They are computed once if the model's cache can be repeated
    for several rows, which needs full attention in every layer.
    """
    cache = _cache_of(model, ids[:1, :shared], layers[-1]) if shared else None
    if cache is None:
        return [h[:, shared:] for h in _outputs_until(model, layers, input_ids=ids, use_cache=False)]
    cache.batch_repeat_interleave(len(ids))
    return _outputs_until(model, layers, input_ids=ids[:, shared:], past_key_values=cache, use_cache=True)


def _cache_of(model: Model, ids: Tensor, last: int) -> Any:
    """Keys and values of the row ids [1, T] up to block `last`; None where a layer keeps something else, or nothing."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    cache = DynamicCache(config=model.net.config)
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    _outputs_until(model, [last], input_ids=ids, past_key_values=cache, use_cache=True)
    return cache if cache.get_seq_length() == ids.shape[1] else None


def _outputs_until(model: Model, layers: Sequence[int], **inputs: Any) -> list[Tensor]:
    """The outputs of the blocks `layers` (ascending), or what the head is given; the pass ends at the last of them."""
    taken: list[Tensor] = []
    blocks = [layer for layer in layers if layer < len(model.layers)]

    def take(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.ndim == 4:  # several streams: the active one of [streams, B, T, d], or the mean of [B, T, streams, d]
            active = getattr(model.net.config.get_text_config(), "altup_active_idx", None)
            hidden = hidden.mean(2) if active is None else hidden[active]
        taken.append(hidden)
        if len(taken) == len(layers):
            raise _Reached

    handles = [model.layers[layer].register_forward_hook(take) for layer in blocks]
    if len(blocks) < len(layers):
        head = model.net.get_output_embeddings()
        handles.append(head.register_forward_pre_hook(lambda module, args: take(module, (), args[0])))
    try:
        # Newer transformers take `cache` for past_key_values, older ones know no other name than that.
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            model.net(**inputs)
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return taken
