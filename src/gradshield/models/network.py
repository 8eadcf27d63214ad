"""A model's network from its files: every tensor that it has comes from them, and none of theirs is left over.

transformers fills what a checkpoint lacks with random numbers and drops what it doesn't know. Both are errors here.
"""

import importlib.util
import io
import logging
import math
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from gradshield.base.errors import UserError, first_line, out_of_memory
from gradshield.models.files import (
    Shapes,
    check_scales,
    odd_expert,
    read_config,
    refuse_numbers,
    shapes_of,
    shown,
    weight_files,
)
from gradshield.models.gguf import ROPE_FACTORS

_EXTRA_ELEMENTS = 2**24  # elements that a config may describe beyond twice those in the files
_MOST_LAYERS = 1_000_000  # and labels
_PACKED = 16  # elements at most that a quantised checkpoint packs into one


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Silences progress bars, warnings and notices of libraries while a model loads. Errors are still raised."""
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


def load_net(
    name: str, source: dict[str, Any], shapes: Shapes, quantize: str | None, device: str, dtype: str | None
) -> Any:
    """The network that transformers makes of `source` (the keywords of from_pretrained), in evaluation mode.

    `shapes` are those of the tensors in its files. Raises UserError for tensors that are missing, left over, or of
    another shape than in the config, and names them. Also for weights that are not finite, and if it does not fit.
    """
    from transformers import AutoModelForCausalLM

    kwargs: dict[str, Any] = {"dtype": _dtype(source, device, dtype), "trust_remote_code": False, **source}
    if "gguf_file" not in source:
        kwargs["use_safetensors"] = True
    if quantize:
        kwargs["quantization_config"] = _quantization(quantize, device)
    if device == "auto" or quantize:
        kwargs["device_map"] = device
    try:
        with quiet_loading():
            config = _check_described(name, source, shapes)
            if _replaced_attention(config):
                config._attn_implementation = None  # the default of its kind, here and in its parts
                kwargs["config"] = config
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                **kwargs, output_loading_info=True, ignore_mismatched_sizes=True
            )
            net, info = loaded
    except UserError:
        raise
    except Exception as error:  # what a file says can make any of transformers' lines fail
        raise UserError(_why(f"model {name}", error)) from error
    check_complete(name, net, info)
    for module in net.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):  # of bitsandbytes, whose quick way has no gradient
            module.support_avx512bf16_for_cpu = False
    if "gguf_file" in source:  # dequantised on loading: what remains of the mark only hinders saving
        net.hf_quantizer, net.is_quantized, net.quantization_method = None, False, None
        if hasattr(net.config, "quantization_config"):
            delattr(net.config, "quantization_config")
    check_finite(f"model {name}", net)
    try:
        return net.eval() if "device_map" in kwargs else net.to(device).eval()
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise UserError(f"model {name} does not fit on {device}: --quantize 4bit, or --device auto") from error


def _on_cpu(device: str) -> bool:
    return device == "cpu" or (device == "auto" and not torch.accelerator.is_available())


def _dtype(source: dict[str, Any], device: str, dtype: str | None) -> Any:
    if dtype:
        wanted = getattr(torch, dtype, None)
        if not (isinstance(wanted, torch.dtype) and wanted.is_floating_point):
            raise UserError(f"--dtype {dtype}: not a torch dtype (float32, bfloat16 or float16)")
        return wanted
    own = torch.bfloat16 if "gguf_file" in source else "auto"  # which, for a GGUF, is float32
    return torch.float32 if _on_cpu(device) else own


def _quantization(quantize: str, device: str) -> Any:
    from transformers import BitsAndBytesConfig

    if quantize not in ("4bit", "8bit"):
        raise UserError(f"--quantize {quantize}: use 4bit or 8bit")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"--quantize {quantize} needs bitsandbytes: pip install bitsandbytes")
    # It says at every call that 8-bit Linears round what they are given, also where that can't be otherwise.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return BitsAndBytesConfig(
        load_in_4bit=quantize == "4bit",
        load_in_8bit=quantize == "8bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32 if _on_cpu(device) else torch.bfloat16,
    )


def _replaced_attention(config: Any) -> bool:
    """True if the config asks for flex_attention or paged attention.

    flex_attention gives the same result, but compiles for seconds and has no gradients on a CPU. Paged attention masks
    nothing outside of a server.
    """
    asked = (config._attn_implementation, config.get_text_config()._attn_implementation)
    return any(str(each).startswith(("flex_attention", "paged|")) for each in asked)


def _check_described(name: str, source: dict[str, Any], shapes: Shapes) -> Any:
    """The model's config. Raises UserError if it describes far more than the files hold, before memory is taken for it.
    Also if it has no place for a tensor of a GGUF file."""
    from transformers import AutoConfig, AutoModelForCausalLM

    trust = source.get("trust_remote_code", False)
    if "gguf_file" not in source:
        folder = Path(source["pretrained_model_name_or_path"])
        check_config(name, folder)
        if (folder / "generation_config.json").is_file():  # transformers goes on without one that it can't read
            read_config(folder / "generation_config.json")
    config = AutoConfig.from_pretrained(**{"trust_remote_code": False, **source})
    said = getattr(config, "quantization_config", None)
    if isinstance(said, dict) and said.get("quant_method") == "fp8" and "gguf_file" not in source:
        check_scales(name, weight_files(Path(source["pretrained_model_name_or_path"])), said)
    if isinstance(said, dict) and said.get("quantization_mode") == "online":
        raise UserError(
            f"model {name}: its config.json says that its weights are to be rounded as they load (quantization_mode); "
            "remove quantization_config from it"
        )
    packed = any(key.endswith((".absmax", ".SCB")) for key in shapes)
    if isinstance(said, dict) and said.get("quant_method") == "bitsandbytes" and not packed:
        raise UserError(
            f"model {name}: its config.json says that bitsandbytes quantised the weights, but they are not; remove "
            "quantization_config from it, and use --quantize 4bit or 8bit"
        )
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(layers, int) and layers > len(shapes):
        raise UserError(f"model {name}: its config describes {layers} layers, its files hold {len(shapes)} tensors")
    with torch.device("meta"):
        net = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
    if "gguf_file" in source and (left := _dropped(net, shapes)):
        raise UserError(_left_over(name, left, net))
    if "gguf_file" not in source:
        _check_sources(name, net, shapes)
    held = sum(map(math.prod, shapes.values())) * (_PACKED if hasattr(config, "quantization_config") else 2)
    tensors = {key: tuple(t.shape) for key, t in (*net.named_parameters(), *net.named_buffers())}
    described = sum(map(math.prod, tensors.values()))
    if described > held + _EXTRA_ELEMENTS:
        worst = max(tensors, key=lambda key: math.prod(tensors[key]) - math.prod(shapes.get(key, (0,))))
        raise UserError(
            f"model {name}: its config describes {described:.2g} weights, its files hold "
            f"{sum(map(math.prod, shapes.values())):.2g}; the largest is {worst} {list(tensors[worst])}"
        )
    return config


def _check_sources(name: str, net: Any, shapes: Shapes) -> None:
    """Raises UserError for two tensors that transformers loads as one weight, as it drops one of them. Also for experts
    that it would stack although one is missing or misshapen."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    own, base, changes = net.state_dict(), net.base_model_prefix, get_model_conversion_mapping(net)
    renamings = [change for change in changes if isinstance(change, WeightRenaming)]
    converters = [change for change in changes if isinstance(change, WeightConverter)]
    converter_of = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    sources: dict[str, dict[Any, str]] = {}  # place → tensor, of each weight; several are right for one converter
    converted: Shapes = {}
    for key in sorted(shapes, key=dot_natural_key):  # as transformers goes through them
        weight, pattern = rename_source_key(key, renamings, converters, base, own)
        if weight not in own and key in own:
            weight, pattern = rename_source_key(key, [], [], base, own)
        if weight not in own:
            continue
        weights, place = [weight], (None,)
        if pattern is not None:
            converter, converted[key] = converter_of[pattern], shapes[key]
            first, *_ = converter.target_patterns
            weights = [weight.replace(first, target) for target in converter.target_patterns]
            place = (id(converter), pattern, *re.findall(r"\d+", key))
        for each in weights:
            held = sources.setdefault(each, {})
            before = place if place in held else next(iter(held), place)
            if before in held and (before == place or before[0] != place[0]):
                raise UserError(
                    f"model {name}: its files hold {shown([held[before]])} and {shown([key])}, which are one weight of "
                    f"a {type(net).__name__}; remove the one that is not the model's"
                )
            held[place] = key
    if odd := odd_expert(converted):
        raise UserError(f"model {name}: {odd}")


def check_config(name: str, folder: Path) -> None:
    """Raises UserError for a config that names a file of weights (it may be a pickle), another config, or kernels of a
    Hub repository (they are code). Also for a count of layers or labels that fills the memory when it is read."""
    parts = [read_config(folder / "config.json")]
    for part in parts:
        for key, what in (("transformers_weights", "a file of weights"), ("configuration_files", "another config")):
            if part.get(key):
                raise UserError(f"model {name}: its config.json names {what} ({key}); remove it")
        parts += [value for value in part.values() if isinstance(value, dict)]
        for key, value in part.items():
            if key.endswith("_implementation") and "/" in str(value):
                raise UserError(f"model {name}: {key[:80]} in its config.json names a repository of kernels; remove it")
            count = len(value) if key == "id2label" and isinstance(value, dict) else value
            if re.search(r"layers?$|^num_labels$|^id2label$", key) and isinstance(count, int) and count > _MOST_LAYERS:
                is_count = "is" if count is value else "holds"
                raise UserError(f"model {name}: {key[:80]} in its config.json {is_count} {count}; no model has so many")


def check_complete(name: str, net: Any, info: dict[str, Any]) -> None:
    """Raises UserError for tensors that transformers invented, rejected or dropped."""
    if wrong := sorted(info["mismatched_keys"]):
        key, found, wanted = wrong[0]
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise UserError(
            f"model {name}: {key[:120]} is {list(found)} in its files and {list(wanted)} by its config{more}"
        )
    if info["missing_keys"]:
        raise UserError(f"model {name}: its files lack {shown(info['missing_keys'])}; download it again")
    buffers = [buffer for buffer, _ in net.named_buffers()]  # which are computed; refuse_other_buffers compares them
    left = {key for key in info["unexpected_keys"] if not any(b == key or b.endswith(f".{key}") for b in buffers)}
    if left:
        raise UserError(_left_over(name, left, net))
    if info["error_msgs"]:
        raise UserError(f"model {name} can't be loaded: {str(info['error_msgs'][0])[:300]}")


def refuse_other_buffers(name: str, net: Any, files: Iterable[Path]) -> None:
    """Raises UserError where safetensors files hold a buffer that the network computes, with another shape or other
    values: transformers drops what they hold."""
    read = net.state_dict().keys()
    computed = {key: buffer for key, buffer in net.named_buffers() if key not in read and not buffer.is_meta}
    theta = (getattr(net.config.get_text_config(), "rope_parameters", None) or {}).get("rope_theta")
    other = set()
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                end = ".".join(key.split(".")[-2:])  # which layer it is in differs between versions
                alike = [buffer for own, buffer in computed.items() if f".{own}".endswith(f".{end}")]
                if not alike and "rotary_emb.inv_freq" not in key:
                    continue
                if theta and end.endswith("inv_freq"):  # earlier versions stored frequencies before scaling
                    alike += [theta ** -(torch.arange(len(buffer)) / len(buffer)) for buffer in alike]
                found = opened.get_tensor(key)
                if not any(_same_values(found, buffer) for buffer in alike):
                    other.add(key)
    if other:
        raise UserError(
            f"model {name}: its files hold {shown(other)}, which a {type(net).__name__} with its config doesn't "
            "use; correct the config, or remove the tensor"
        )


def refuse_rounded(net: Any, files: Iterable[Path], config: Path) -> None:
    """Raises UserError where safetensors files hold other numbers than floats for weights, as `refuse_numbers`. The
    network's own buffers may be whole, in whichever layer, and so may what it leaves out, and the bytes that two
    methods of quantisation unpack."""
    said = read_config(config)
    parts = [part for part in (said, said.get("text_config")) if isinstance(part, dict)]
    quantized = next((part["quantization_config"] for part in parts if part.get("quantization_config")), None)
    method = quantized.get("quant_method") if isinstance(quantized, dict) else None
    if not quantized or method in ("fp8", "mxfp4"):
        whole = (name for name, buffer in net.named_buffers() if not buffer.is_floating_point())
        ends = {re.escape(".".join(name.split(".")[-2:])) + "$" for name in whole}
        known = "|".join(f"({each})" for each in (*ends, *(net._keys_to_ignore_on_load_unexpected or ())))
        allowed = re.compile(rf"(^|\.)({known})" if known else "(?!)")
        stored = {name for file in files for name in shapes_of(file)} if method == "fp8" else set()
        packed = {"fp8": r"[._]scale(_inv)?$", "mxfp4": r"_(blocks|scales)$"}.get(method or "", "(?!)")

        def fits(name: str) -> bool:
            scaled = {f"{name}_scale_inv", f"{name}_scale", f"{name.removesuffix('weight')}scale"} & stored  # of FP4
            return bool(allowed.search(name) or re.search(packed, name) or scaled)

        refuse_numbers(files, fits)
    elif not getattr(net.config, "quantization_config", None):  # dequantised: the packed ones had other names
        floats = {".".join(name.split(".")[-3:]) for name, _ in net.named_parameters()}
        refuse_numbers(files, lambda name: ".".join(name.split(".")[-3:]) not in floats)


def _same_values(found: torch.Tensor, buffer: torch.Tensor) -> bool:
    rounding = 0.01 if found.is_floating_point() else 0  # of 16 bits, and of those too small for float16
    wanted = buffer.detach().cpu().double()
    return found.shape == wanted.shape and torch.allclose(found.double(), wanted, rtol=rounding, atol=1e-7)


def _left_over(name: str, left: set[str], net: Any) -> str:
    kind = type(net).__name__
    return f"model {name}: its files hold {shown(left)}, which a {kind} as its config describes has not"


def _dropped(net: Any, shapes: Shapes) -> set[str]:
    """The tensors of a GGUF file that transformers' older reader silently drops."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    kind = net.config.get_text_config().model_type
    processor = TENSOR_PROCESSORS.get(kind.replace("_", ""), TensorProcessor)(config=net.config.to_dict())
    try:
        known = get_gguf_hf_weights_map(net, processor)
    except NotImplementedError:  # an architecture of the newer reader, which reports all but those named as buffers
        buffers = [f".{key}" for key, _ in net.named_buffers()]
        return {n for n in shapes if "rotary_emb.inv_freq" in n or any(key.endswith(f".{n}") for key in buffers)}
    elsewhere = {ROPE_FACTORS, "output.weight"}  # the one read by us, the other by its processor
    experts = any("experts" in key for key, _ in net.named_parameters())
    left = {name for name in shapes if name not in known and name not in elsewhere}
    return {name for name in left if not (experts and "_exps." in name)}


def check_finite(what: str, net: Any) -> None:
    """Raises UserError that names the weights and buffers that are NaN or infinite; not offloaded ones."""
    bad = [
        key
        for key, weight in (*net.named_parameters(), *net.named_buffers())
        if weight.is_floating_point() and not weight.is_meta and not _is_finite(weight)
    ]
    if bad:
        raise UserError(f"{what}: {shown(bad)} holds NaN or infinity; download it again, or try --dtype float32")


def _is_finite(weight: torch.Tensor) -> bool:
    """Whether every element is finite. One that is not makes the sum so, which is quicker to find; a sum that
    overflows tells nothing."""
    weight = weight.float() if weight.element_size() == 1 else weight  # torch adds up no floats of 8 bits
    return bool(weight.detach().sum().isfinite()) or bool(weight.isfinite().all())


@torch.no_grad()
def check_computes(name: str, net: Any, ids: list[int]) -> None:
    """Raises UserError if the network fails on these token ids, its logits are NaN, or a later token changes earlier
    logits. An offloaded network is not tried, because all its weights would have to be moved in."""
    if any(weight.is_meta for weight in net.parameters()):
        return
    device = net.get_input_embeddings().weight.device
    try:
        with quiet_loading():
            both = [[*ids, 0], [*ids, 1]]  # in one batch, so that its rows are rounded alike
            logits = net(input_ids=torch.tensor(both, device=device), use_cache=True).logits
    except Exception as error:  # what a config says can make any of its lines fail
        if out_of_memory(error):
            raise UserError(f"model {name} does not fit on {device}: --quantize 4bit, or --device auto") from error
        raise UserError(f"model {name} can't compute: {type(error).__name__}: {first_line(error)}") from error
    if logits.isnan().any():
        raise UserError(f"model {name}: its logits are NaN, though its weights are not; try --dtype float32")
    one, other = logits[:, :-1].float()
    tolerance = 1e-3 if logits.dtype == torch.float32 else 0.2  # of their usual size
    if ((one - other).abs() > tolerance * one.abs().median()).any():
        raise UserError(
            f"model {name}: not a causal language model (a later token changes what is predicted before it); correct "
            "is_causal or is_decoder in its config.json, or use another model"
        )


def _why(what: str, error: Exception) -> str:
    """One line about an error of a library."""
    own = isinstance(error, OSError | ValueError | ImportError | RuntimeError)
    kind = "" if own and str(error).strip() else f"{type(error).__name__}: "
    return f"{what} can't be loaded: {kind}{first_line(error)}"
