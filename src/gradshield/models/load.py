"""Hub id, local folder, GGUF file or adapter → a frozen model with its tokenizer; the embedded default.

Weights come from safetensors or GGUF only, never from a pickle, and no remote code runs unless the user asks.
"""

import gc
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradshield.base.errors import UserError, first_line
from gradshield.base.settings import ModelSettings
from gradshield.models.adapters import CONFIG, WEIGHTS, base_of, with_adapter
from gradshield.models.experts import Expert, experts_of
from gradshield.models.files import Shapes, local_folder, text_files, weight_files
from gradshield.models.fingerprint import fingerprint_of
from gradshield.models.gguf import alone, apply_rope_factors, gguf_header, is_gguf, refuse_ignored, shared_reader
from gradshield.models.memory import automatic_tokens, keep_memory
from gradshield.models.network import load_net, refuse_other_buffers, refuse_rounded
from gradshield.models.on_disk import ADAPTER, EMBEDDED, EMBEDDED_BASE, embedded_gguf
from gradshield.models.tokenizer import check_fits, load_tokenizer


@dataclass(frozen=True)
class Model:
    """A frozen causal language model in evaluation mode, with the tokenizer that encodes its rows."""

    name: str
    net: Any  # transformers.PreTrainedModel
    tokenizer: Any  # transformers.PreTrainedTokenizerBase
    fingerprint: str  # changes when weights, their configs, the tokenizer or its chat template do
    adapters: tuple[str, ...] = ()  # on top of the model of that name, the uppermost last
    batch_tokens: int = 2048  # tokens of a batch, padding included, that suit its device

    @property
    def base(self) -> str:
        """The name for a further adapter's config: the uppermost adapter, whose own config names the model below it."""
        return self.adapters[-1] if self.adapters else self.name

    @property
    def device(self) -> torch.device:
        """The device for token ids: that of the input embedding."""
        embedding = self.net.get_input_embeddings()
        return device_of(embedding, embedding.weight)

    @property
    def positions(self) -> int | None:
        """The maximum length in tokens that the config supports; None if it sets no limit."""
        bound = getattr(self.net.config.get_text_config(), "max_position_embeddings", None)
        return bound if isinstance(bound, int) else None

    @cached_property
    def layers(self) -> tuple[nn.Module, ...]:
        """The decoder blocks, first to last: the longest ModuleList of the decoder that is not within another one.

        The network is searched if the decoder has none. It comes second, as an image encoder may have more layers.
        """
        decoder = self.net.get_decoder() if hasattr(self.net, "get_decoder") else None
        for root in (decoder, self.net) if isinstance(decoder, nn.Module) else (self.net,):
            lists = {name: m for name, m in root.named_modules() if isinstance(m, nn.ModuleList)}
            outer = [m for name, m in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
            if outer:
                return tuple(max(outer, key=len))
        return ()

    @cached_property
    def linears(self) -> dict[str, nn.Module | Expert]:
        """Name → module of every Linear (also Conv1D and quantised ones) inside the decoder blocks, and each expert's
        matrices where experts are stored as one 3-D weight.

        The head and an adapter's own factors are left out, and so are Linears that share one weight, whose gradient is
        the sum of theirs.
        """
        inside = {id(m) for layer in self.layers for m in layer.modules()}
        named = [(n, m) for n, m in self.net.named_modules() if id(m) in inside and ".lora_" not in n]
        weights = {name: m.weight for name, m in named if is_linear(m)}  # held, so that no two have one id
        sharing = Counter(map(id, weights.values()))
        found: dict[str, nn.Module | Expert] = {}
        for name, module in named:
            if name not in weights:
                found |= experts_of(name, module)
            elif sharing[id(weights[name])] == 1:
                found[name] = module
        return found

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """Name → parameter of the weights that `linears` are made of; experts share one."""
        chosen = {id(m.stacked if isinstance(m, Expert) else m.weight) for m in self.linears.values()}
        return {name: weight for name, weight in self.net.named_parameters() if id(weight) in chosen}

    def coverage(self) -> tuple[float, list[str]]:
        """Share of the decoder blocks' matrix weights that `linears` covers, and the names of those it does not."""
        covered = {id(weight) for weight in self.weights.values()}
        total = seen = 0
        missing = []
        for index, layer in enumerate(self.layers):
            for name, weight in layer.named_parameters():
                if weight.ndim < 2 or ".lora_" in name or name.endswith("bias"):
                    continue
                total += weight.numel()
                if id(weight) in covered:
                    seen += weight.numel()
                elif index == 0 or index == len(self.layers) - 1:
                    missing.append(f"layer {index}: {name} {tuple(weight.shape)}")
        return (seen / total if total else 0.0), missing


def device_of(module: Any, weight: torch.Tensor) -> torch.device:
    """The device on which the module computes. accelerate moves an offloaded weight there only for the module's forward
    pass.
    """
    return torch.device(module._hf_hook.execution_device) if weight.is_meta else weight.device


@contextmanager
def parked_on_cpu(model: Model) -> Iterator[None]:
    """Context in which the weights are in CPU memory, so that another copy fits on their GPU. Weights of a device map
    can't be moved, so they stay.
    """
    home = model.device
    moves = home.type != "cpu" and not getattr(model.net, "hf_device_map", None)
    if moves:
        model.net.to("cpu")
        free_memory()
    try:
        yield
    finally:
        if moves:
            free_memory()
            model.net.to(home)


def free_memory() -> None:
    """Returns GPU memory of deleted models and batches from the allocator to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_linear(module: nn.Module) -> bool:
    """True where y = W x (+ b), so that the weight's gradient is Σ_t δ_t x_tᵀ: Linear, its quantised kin, Conv1D. Not
    those subclasses that are routers and give a tuple, or multiply by groups."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D) and not re.search("Router|Grouped", type(module).__name__)


def load_model(
    name: str = EMBEDDED,
    *,
    adapter: str | Sequence[str] | None = None,
    quantize: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    chat_template: str | None = None,
    trust_remote_code: bool = False,
    batch_tokens: int | None = None,
) -> Model:
    """The model called `name`: "embedded", a Hub id, a local folder, a `.gguf` file, or a PEFT adapter's folder.

    - `adapter`: a PEFT adapter on top of it, or several, one over the other; merged, unless the weights are quantised.
    - `quantize`: "4bit" or "8bit" (bitsandbytes).
    - `device`: a torch device, or "auto" for accelerate's device map.
    - `dtype`: a torch dtype's name. Default: float32 on a CPU, bfloat16 for your GGUF, else the checkpoint's own.
    - `batch_tokens`: the size of a batch. Default: by the device.

    Raises UserError for a model that is not there, has no safetensors, or does not fit. Also for an adapter that is not
    one, and for several over quantised weights.
    """
    uppermost: list[str] = [adapter] if isinstance(adapter, str) else list(adapter or ())
    name, below = _through_adapters(name, trust_remote_code)
    adapters = [*below, *uppermost]
    named = tuple(str(Path(each).resolve()) if Path(each).exists() else each for each in adapters)
    folders = [local_folder(each, "adapter") for each in adapters]
    bundled = name in (EMBEDDED, EMBEDDED_BASE)
    if name == EMBEDDED:
        folders = [ADAPTER, *folders]
    if quantize and len(folders) > 1:  # which can't be merged, and PEFT silently drops one that lies over another
        raise UserError(
            f"--quantize {quantize}: quantised weights support only one adapter, not "
            f"{' and '.join(map(str, folders))}: leave out --quantize, or merge the lower one into its base"
        )
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    _check_device(device)
    source, shapes, files = _source(name, trust_remote_code)
    gguf = "gguf_file" in source
    with alone(source) as source, shared_reader() if gguf else nullcontext():
        net = load_net(name, source, shapes, quantize, device, dtype)
        if gguf:
            apply_rope_factors(net, files[0], shapes)
            refuse_ignored(net, files[0])
        tensors = [] if gguf else [file for file in files if file.suffix == ".safetensors"]
        refuse_other_buffers(name, net, tensors)
        if not gguf:
            refuse_rounded(net, tensors, Path(source["pretrained_model_name_or_path"]) / "config.json")
        rows = int(net.get_input_embeddings().weight.shape[0])
        found = load_tokenizer(name, source, folders, chat_template, rows, bundled=bundled)
    for folder in folders:
        net = with_adapter(net, folder, merge=quantize is None)
        files += [folder / WEIGHTS, *text_files(folder)]
    net.eval()
    net.requires_grad_(False)
    check_fits(name, found, net)
    tokenizer = found.tokenizer
    model = Model(name, net, tokenizer, fingerprint_of(files, quantize, net, tokenizer), named)
    if model.device.type == "cpu":
        keep_memory()
    return replace(model, batch_tokens=batch_tokens or automatic_tokens(net, model.device))


def _through_adapters(name: str, code: bool) -> tuple[str, list[str]]:
    """(base model, adapters from the lowest to `name`) where `name` is an adapter, else (name, [])."""
    adapters: list[str] = []
    seen: set[Path] = set()
    while not (name in (EMBEDDED, EMBEDDED_BASE) or name.endswith(".gguf") or is_gguf(Path(name))):
        folder = local_folder(name, code=code)
        if not (folder / CONFIG).is_file():
            break
        if folder.resolve() in seen:
            raise UserError(
                f"{folder / CONFIG}: it names itself as its base model; pass --model BASE --adapter {folder}"
            )
        seen.add(folder.resolve())
        adapters.insert(0, name)
        name = base_of(folder)
    return name, adapters


def _source(name: str, trust_remote_code: bool) -> tuple[dict[str, Any], Shapes, list[Path]]:
    """(keywords of from_pretrained, shapes of the tensors, every file that is read) of a model that is no adapter."""
    if name in (EMBEDDED, EMBEDDED_BASE) or is_gguf(Path(name)):
        path = Path(name)
        if not is_gguf(path):
            folder, file = embedded_gguf()
            path = folder / file
        source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
        return source, gguf_header(path).shapes, [path]
    if name.endswith(".gguf"):
        state = "not a GGUF file (it does not begin with GGUF)" if Path(name).is_file() else "no such GGUF file"
        raise UserError(f"{name}: {state}")
    folder = local_folder(name, code=trust_remote_code)
    if not (folder / "config.json").is_file():
        raise UserError(f"model {folder}: not a model saved by transformers (it has no config.json)")
    weights = weight_files(folder)
    shapes = {key: shape for of_file in weights.values() for key, shape in of_file.items()}
    files = [*weights, *text_files(folder, code=trust_remote_code)]
    return {"pretrained_model_name_or_path": str(folder), "trust_remote_code": trust_remote_code}, shapes, files


def _check_device(device: str) -> None:
    if device == "auto":
        return
    try:
        torch.empty(1, device=device).item()  # fails on "meta", which computes nothing
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {device}: not available here ({first_line(error, 100)})") from None


def load_settings_model(settings: ModelSettings, over: str | None = None) -> Model:
    """The model that the settings name, with the adapter `over` on top, if there is one."""
    return load_model(
        settings.model,
        adapter=[a for a in (settings.adapter, over) if a],
        quantize=settings.quantize,
        device=settings.device,
        dtype=settings.dtype,
        chat_template=settings.chat_template,
        trust_remote_code=settings.trust_remote_code,
        batch_tokens=settings.batch_tokens,
    )
