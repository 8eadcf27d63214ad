"""PEFT adapters over a network: the base that one names, what fits, and merging that leaves the model the same."""

import re
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from gradshield.base.deadline import time_limit
from gradshield.base.errors import UserError, first_line
from gradshield.data.templates import LIMIT
from gradshield.models.files import Shapes, read_config, refuse_numbers, shapes_of, shown
from gradshield.models.network import check_finite, quiet_loading

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PATTERNS = (  # keys of a config, and how PEFT tries the regular expressions there on a module's name
    ("(target|exclude|feedforward)_modules", re.fullmatch, "{}"),
    ("modules_to_save", re.match, r"(^|.*\.){}($|\..*)"),
    ("layers_pattern", re.match, r"(?:^|.*?\.){}\.(?P<idx>\d+)\."),
    (r"\w+_pattern", re.match, r"(.*\.)?({})$"),
    (r"\w+_pattern", re.match, r".*\.{}$"),
    (r"\w+_pattern", re.search, "{}"),
)
_FREE = "seed|prng|step|warmup|interval|tinit|tfinal|deltaT|alpha|lambda|token|layers_to_transform"  # take no memory
_ANY_SIZE = 1024  # a size up to which a config's numbers need no tensor that large


def base_of(folder: Path) -> str:
    """The base model that an adapter's folder names. Raises UserError if it names none."""
    base = read_config(folder / CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base or not base.isprintable():
        raise UserError(f"{folder / CONFIG}: names no base model; pass --model BASE --adapter {folder}")
    return base


def with_adapter(net: Any, folder: Path, merge: bool) -> Any:
    """The network with the adapter in `folder` over it, merged into it or not.

    Raises UserError if it is no adapter, or its tensors are not exactly those that its config describes on this
    network. Also for kinds whose effect is not in the weights.
    """
    what = f"adapter {folder}"
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{what}: no {WEIGHTS} in it (pickled adapters are not read)")
    shapes = shapes_of(folder / WEIGHTS)
    refuse_numbers([folder / WEIGHTS], lambda name: bool(re.search(r"_(indices|size)(\.|$)", name)))
    config = _config(what, folder)
    _check_sizes(folder / CONFIG, config, shapes, int(net.get_input_embeddings().weight.shape[0]))
    _check_patterns(what, net, config)
    touched, tied = _embeddings(what, net, shapes), _tied(net)
    if touched and tied and config.get("ensure_weight_tying"):
        raise UserError(f"{what}: its {touched[0]} is tied to another layer; merge it with PEFT and use the result")
    before = None
    try:
        replicated = sum(len(range(*pair)) for pair in config.get("layer_replication") or ())
        if replicated > len(shapes):
            raise UserError(f"{what}: its config describes {replicated} layers, its file holds {len(shapes)} tensors")
        if tied:
            kept = tuple(config.get("modules_to_save") or ())  # which have weights of their own, and no base's
            _check_ends_agree(what, folder / WEIGHTS, [name for name in touched if not name.endswith(kept)])
        with quiet_loading():
            from peft import PeftModel

            mapping = getattr(net, "_checkpoint_conversion_mapping", None) or {}
            with warnings.catch_warnings(action="ignore"):
                wrapped = PeftModel.from_pretrained(net, str(folder), key_mapping=mapping)
            result = wrapped.load_adapter(str(folder), "default", key_mapping=mapping)  # which says what was left
            if result.missing_keys or result.unexpected_keys:
                lacking = [key.replace(".default", "") for key in result.missing_keys]
                said = f"lacks {shown(lacking)}" if lacking else f"holds {shown(result.unexpected_keys)}"
                raise UserError(f"{what}: it {said}; it was made for another base model")
            check_finite(what, wrapped)
            wrapped.eval()
            merged = wrapped
            if merge:
                before = _logits(wrapped)
                _unshare(wrapped, everything=replicated > 0)
                merged = wrapped.merge_and_unload()
            check_finite(what, merged)  # again, as the scaling in the config can be NaN
    except UserError:
        raise
    except Exception as error:  # what a file says can make any of PEFT's lines fail
        why = str(error).replace("\n\t", " ")
        kind = "" if isinstance(error, OSError | ValueError | RuntimeError) else f"{type(error).__name__}: "
        raise UserError(f"{what} can't be loaded: {kind}{first_line(type(error)(why))}") from error
    if before is not None:
        if tied and not _tied(merged):
            _mark_untied(merged)
        drift = (_logits(merged) - before).abs().amax(-1) / before.abs().max()
        # In 16 bits a token or two may be sent to other experts.
        same = drift.max() <= 0.02 if merged.dtype == torch.float32 else drift.median() <= 0.1
        if not same:
            raise UserError(f"{what}: merging it into the weights changes the model; merge it with PEFT and check it")
    return merged


def _config(what: str, folder: Path) -> dict[str, Any]:
    """The keys of the adapter's config that PEFT reads. Raises UserError for one whose effect is not in the weights."""
    with quiet_loading():  # bitsandbytes prints a notice when PEFT imports it
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
        from peft.utils.peft_types import PeftType

    config = read_config(folder / CONFIG)
    kind = config.get("peft_type")
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(PeftType(kind)) if kind in list(PeftType) else None
    if known is None:
        raise UserError(f"{folder / CONFIG}: peft_type {str(kind)[:40]!r} is unknown to this version of PEFT")
    prompted = kind in ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT")
    if prompted or kind in ("ADAPTION_PROMPT", "CARTRIDGE", "XLORA"):
        raise UserError(
            f"{what}: {kind} can't be merged into weights, so it can't be scored; use LoRA or a similar method"
        )
    if kind == "VBLORA":
        raise UserError(f"{what}: VB-LoRA saves one bank for all layers, which PEFT can't check; merge it with PEFT")
    if str(init := config.get("init_lora_weights")).startswith("pissa_niter"):
        raise UserError(
            f"{what}: {str(init)[:40]} changes the base by random numbers at every load, so the trained model can't be "
            "restored; save it as plain LoRA (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    if config.get("megatron_config"):
        raise UserError(f"{folder / CONFIG}: megatron_config names a module to import; remove it")
    return {key: value for key, value in config.items() if key in known.__dataclass_fields__}


def _check_sizes(file: Path, config: dict[str, Any], shapes: Shapes, rows: int) -> None:
    """Raises UserError for a number or a list in the config that is larger than any tensor, or than the vocabulary's
    `rows`. PEFT allocates what the config says before it looks at the tensors."""
    largest = max([_ANY_SIZE, *(size for shape in shapes.values() for size in shape)])
    pending = list(config.items())
    while pending:
        key, value = pending.pop()
        if isinstance(value, dict | list):
            if len(value) > max(largest, rows):
                raise UserError(f"{file}: its {key} has {len(value):,} entries, the model a vocabulary of {rows:,}")
            pending += [(key, each) for each in (value.values() if isinstance(value, dict) else value)]
        elif isinstance(value, int) and value > largest and not re.search(_FREE, key):
            raise UserError(f"{file}: its {key} of {shown([str(value)])} fits no tensor of {WEIGHTS}; save it again")


def _check_patterns(what: str, net: Any, config: dict[str, Any]) -> None:
    """Raises UserError for a regular expression that does not end on the names of this network's modules."""
    names = [prefix + name for prefix in ("", "base_model.model.") for name, _ in net.named_modules()]
    for keys, match, form in _PATTERNS:
        given = [value for key, value in config.items() if re.fullmatch(keys, key)]
        if match is re.fullmatch:  # lists hold plain names
            given = [value for value in given if isinstance(value, str)]
        patterns = {p for each in given for p in (each if isinstance(each, dict | list) else [each])}
        for pattern in sorted(p for p in patterns if isinstance(p, str)):
            whole = form.format(pattern)
            try:
                with time_limit(LIMIT):
                    for name in names:
                        match(whole, name)
            except TimeoutError as error:
                raise UserError(f"{what}: the regular expression {shown([pattern])} in its config: {error}") from None
            except (re.error, RecursionError, OverflowError):
                continue  # PEFT says what is wrong with it


def _embeddings(what: str, net: Any, shapes: Shapes) -> list[str]:
    """Names of the embedding and the head, as far as the adapter changes them. Raises UserError where it was trained
    with a vocabulary of another size."""
    ends = (net.get_input_embeddings(), net.get_output_embeddings())
    names = {name: module for name, module in net.named_modules() if any(module is end for end in ends)}
    touched = []
    for name, module in names.items():
        keys = [key for key in shapes if f".{name}." in f".{key}."]
        rows = module.weight.shape[0]
        for key in keys:
            if key.endswith((f"{name}.weight", f"{name}.modules_to_save.weight")) and shapes[key][0] != rows:
                raise UserError(
                    f"{what}: its vocabulary was resized: {key} has {shapes[key][0]} rows, the base model {rows}; "
                    "merge it into the resized base and use the result"
                )
        touched += [name] if keys else []
    return touched


def _check_ends_agree(what: str, file: Path, ends: list[str]) -> None:
    """Raises UserError for an adapter with two different base weights, of which tied embeddings would keep one."""
    with safe_open(file, framework="pt") as opened:
        wanted = tuple(f".{name}{part}.weight" for name in ends for part in ("", ".base_layer"))
        keys = [key for key in opened.keys() if f".{key}".endswith(wanted)]  # noqa: SIM118
        if len(keys) > 1 and not torch.equal(*(opened.get_tensor(key) for key in keys[:2])):
            raise UserError(
                f"{what}: {keys[0]} and {keys[1]} differ, but the base model ties them; save the base model with "
                "tie_word_embeddings false and pass it with --model"
            )


def _tied(net: Any) -> bool:
    head = net.get_output_embeddings()
    return head is not None and head.weight is net.get_input_embeddings().weight


def _unshare(wrapped: Any, everything: bool) -> None:
    """Gives every module a weight of its own where several share one that the adapter changes, or share `everything`.
    Merging would change the others, too."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module.get_base_layer() for module in wrapped.modules() if isinstance(module, BaseTunerLayer)]
    adapted = {id(weight) for layer in layers for weight in layer.parameters()}
    seen: set[int] = set()
    for module in wrapped.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if id(weight) in seen and (everything or id(weight) in adapted):
                setattr(module, name, nn.Parameter(weight.detach().clone(), requires_grad=False))
            seen.add(id(weight))


def _mark_untied(net: Any) -> None:
    """Notes in the configs that the head has a weight of its own, so that saving keeps it."""
    for config in {id(c): c for c in (net.config, net.config.get_text_config())}.values():
        config.tie_word_embeddings = False
    for module in net.modules():
        if isinstance(getattr(module, "all_tied_weights_keys", None), dict):
            module.all_tied_weights_keys = {}


@torch.no_grad()
def _logits(net: Any) -> torch.Tensor:
    # Ids from the whole vocabulary: the first ones are mostly special tokens, on which rounding shows most.
    ids = torch.linspace(0, net.config.get_text_config().vocab_size - 1, 18).long()[1:-1]
    return net(input_ids=ids[None].to(next(net.parameters()).device), use_cache=False).logits[0].float().cpu()
