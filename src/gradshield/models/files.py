"""Which files a model consists of. Its weights are safetensors, judged by content and never by name: a pickle, a file
outside of the folder, or a shard that lacks a tensor is an error."""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from typing import Any

from safetensors import safe_open

from gradshield.base.errors import UserError, first_line

Shapes = dict[str, tuple[int, ...]]  # of tensors, by name
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
TEMPLATES = "additional_chat_templates"
TEXTS = (  # configs and tokenizers
    *("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.spm", "*.codes", "*.tokenizer"),
    f"{TEMPLATES}/*.jinja",
)
MAX_TEXT = 64_000_000  # bytes of a config or a tokenizer; parsed, they take up to twenty times as much
_SHOWN = 3  # tensors that an error names
_JOINED = (("w1", "w3"), ("fc1", "fc3"), ("gate_proj", "up_proj"))  # the two that are one weight of a stacked expert
_OTHERS = {  # what is found under a safetensors name, by its first bytes
    b"PK\x03\x04": "a zip archive, as torch.save writes it; pickles are never read",
    b"\x80": "a pickle; pickles are never read",
    b"GGUF": "a GGUF file; give its path instead of the folder",
    b"version https://git-lfs": "a Git LFS pointer; fetch the file itself with git lfs pull",
    b"": "empty; download it again",
}


def local_folder(name: str, kind: str = "model", *, code: bool = False) -> Path:
    """The folder of a model or an adapter: the one called `name`, or the snapshot of the Hub repository `name`.

    What the Hub's cache lacks is downloaded: texts, safetensors and, with `code`, Python files. Raises UserError where
    there is neither.
    """
    check_local(name, kind)
    folder = Path(name)
    if os.path.isdir(name):  # which is false, and no error, for a name too long for a path
        _check_files(folder)
        return folder
    if os.path.exists(name):
        raise UserError(f"{kind} {name}: not a folder; a single file must be GGUF")
    from huggingface_hub import constants, snapshot_download, try_to_load_from_cache

    texts = [*TEXTS, "adapter_model.safetensors", *(["*.py"] if code else [])]
    try:
        folder = Path(snapshot_download(name, allow_patterns=texts, ignore_patterns=["onnx/*", "original/*"]))
        if (folder / "config.json").is_file():
            weights = sorted(_index(folder / INDEX)) if (folder / INDEX).is_file() else [SINGLE]
            snapshot_download(name, allow_patterns=weights)
        return folder
    except UserError:
        raise
    except Exception as error:  # the Hub's own, httpx's, the disk's
        for known in ("config.json", "adapter_config.json"):
            try:
                cached = try_to_load_from_cache(name, known)
            except ValueError:  # no id that the Hub would take
                break
            if isinstance(cached, str):
                return Path(cached).parent
        reached = " (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else " and the connection"
        advice = f"check its id{reached}, or name a local folder"
        raise UserError(f"{kind} {name} can't be loaded: {first_line(error)}; {advice}") from error


def _check_files(folder: Path) -> None:
    """Raises UserError for a pipe or a device, which never ends when read, and for a text over `MAX_TEXT`."""
    for pattern in (*TEXTS, "*.safetensors", "*.py"):
        for file in folder.glob(pattern):
            if file.exists() and not (file.is_file() or file.is_dir()):
                raise UserError(f"{file}: neither a file nor a folder; remove it")
            if pattern in TEXTS and file.is_file() and file.stat().st_size > MAX_TEXT:
                limit = f"the limit of {MAX_TEXT / 1e6:.0f} MB for a config or a tokenizer"
                raise UserError(f"{file}: over {limit}; download the model again, or remove the file")


def check_local(name: str, kind: str = "model") -> None:
    """Raises UserError where `name` is a path, not a Hub id, and nothing is there."""
    if os.path.exists(name):  # false for a name too long for a path
        return
    if name.endswith(".gguf"):
        raise UserError(f"{name}: no such GGUF file")
    if os.path.isabs(name) or name.startswith((".", "~")) or name.count("/") > 1:
        raise UserError(f"{kind} {name}: no such folder; check the path")


def weight_files(folder: Path) -> dict[Path, Shapes]:
    """The safetensors files that transformers loads from a model's folder, with the shapes of their tensors.

    Raises UserError where there are none, one is missing or of another format, two hold the same tensor, or the index
    names a tensor that is not where it says.
    """
    if any(re.match(r"shard-\d{5}-model-", file.name) for file in folder.glob("*.safetensors")):
        raise UserError(f"model {folder}: a distributed checkpoint; save it with save_pretrained")
    if (folder / SINGLE).is_file():
        return {folder / SINGLE: shapes_of(folder / SINGLE)}
    if not (folder / INDEX).is_file():
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth"))
        ggufs = sorted(folder.glob("*.gguf"))
        remedy = "no *.safetensors in it"
        if pickled:
            remedy = "only pickled weights; convert them to safetensors first"
        elif ggufs:
            remedy = f"only GGUF; give the file's path ({ggufs[0]})"
        elif any(folder.glob("*.safetensors")):
            remedy = f"neither {SINGLE} nor {INDEX} in it"
        raise UserError(f"model {folder}: no weights: {remedy}")
    places = _index(folder / INDEX)
    files = {folder / name: shapes_of(folder / name) for name in sorted(places)}
    for file, shapes in files.items():
        if lacking := [name for name in places[file.name] if name not in shapes]:
            raise UserError(f"{file}: lacks {shown(lacking)}, which {INDEX} places there; download it again")
    seen: set[str] = set()
    for file, shapes in files.items():
        if twice := seen & shapes.keys():
            raise UserError(f"{file}: holds {shown(twice)}, which another file of {INDEX} holds, too")
        seen |= shapes.keys()
    return files


def _index(file: Path) -> dict[str, list[str]]:
    """File name → tensors, from an index. Raises UserError for a file that is not in the index's own folder."""
    content = read_config(file)
    mapping = content.get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise UserError(f"{file}: has no weight_map of tensors to files; download it again")
    if not isinstance(content.get("metadata"), dict):
        raise UserError(f'{file}: has no metadata, which transformers needs; add "metadata": {{}}')
    found: dict[str, list[str]] = {}
    for tensor, name in mapping.items():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(
                f"{file}: places {shown([tensor])} in {str(name)[:80]!r}; only safetensors files beside it are read"
            )
        found.setdefault(name, []).append(tensor)
    return found


def shapes_of(file: Path) -> Shapes:
    """The shapes of a safetensors file's tensors. Raises UserError for a file that is not there, is not safetensors,
    is cut short, or holds an empty tensor, as ZeRO-3 leaves them."""
    try:
        with file.open("rb") as stream:
            start = stream.read(32)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; download the model again") from None
    except (OSError, ValueError) as error:  # a folder, a name with a NUL
        raise UserError(f"{file}: can't be read ({first_line(error)})") from None
    try:
        with safe_open(file, framework="numpy") as opened:
            shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors' own
        other = next((what for magic, what in _OTHERS.items() if magic and start.startswith(magic)), None)
        what = other or (_OTHERS[b""] if not start else f"not a whole safetensors file ({first_line(error)})")
        raise UserError(f"{file}: {what}") from None
    if empty := [name for name, shape in shapes.items() if 0 in shape]:
        raise UserError(
            f"{file}: {shown(empty)} is empty, as in a shard of DeepSpeed's ZeRO-3; gather the weights when saving "
            "(stage3_gather_16bit_weights_on_model_save)"
        )
    return shapes


def refuse_numbers(files: Iterable[Path], allowed: Callable[[str], bool]) -> None:
    """Raises UserError where a safetensors file holds integers, booleans or complex numbers under a name that is not
    `allowed`: to convert them to floats would give another model."""
    for file in files:
        with safe_open(file, framework="numpy") as opened:
            for name in opened.keys():  # noqa: SIM118
                kind = opened.get_slice(name).get_dtype()
                if not kind.startswith(("F", "BF")) and not allowed(name):
                    raise UserError(
                        f"{file}: {shown([name])} is {kind}, not floating point; save the weights as floats"
                    )


def check_scales(name: str, files: dict[Path, Shapes], config: dict[str, Any]) -> None:
    """Raises UserError for a matrix of 8-bit floats without scales of the shape that the quantization config says:
    transformers takes the matrix as it is."""
    shapes = {key: shape for of_file in files.values() for key, shape in of_file.items()}
    block = config.get("weight_block_size", (128, 128))
    for file in files:
        with safe_open(file, framework="numpy") as opened:
            for key in opened.keys():  # noqa: SIM118
                if opened.get_slice(key).get_dtype() != "F8_E4M3" or f"{key}_scale" in shapes:
                    continue
                stem = key.removesuffix("weight")
                scale = next((s for s in (f"{stem}scale", f"{stem}qscale_weight") if s in shapes), f"{key}_scale_inv")
                if scale not in shapes:
                    raise UserError(f"model {name}: its files lack {shown([scale])}; download it again")
                shape = shapes[key]
                wanted = (*shape[:-2], *(-(-size // b) for size, b in zip(shape[-2:], block))) if block else ()
                if block and shapes[scale] != wanted:
                    raise UserError(
                        f"model {name}: {shown([scale])} is {list(shapes[scale])} in its files and {list(wanted)} by "
                        "weight_block_size in its config"
                    )


def odd_expert(shapes: Shapes) -> str | None:
    """Returns the problem with a layer's experts, or None: a missing tensor, a gap in the numbers, or a wrong shape.

    Experts are stacked in the order of their numbers. Each must have the shape of the others, and of the gate that
    it is joined to.
    """
    layers: dict[str, dict[tuple[str, str], tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        if m := re.fullmatch(r"(.*\.experts)\.(\d+)\.(.*)", name):
            layers.setdefault(m[1], {})[m[2], m[3]] = shape
    for layer, found in layers.items():
        numbers, parts = (sorted(set(each)) for each in zip(*found))
        for part, number in product(parts, sorted({*numbers, *map(str, range(len(numbers)))})):
            if (number, part) not in found:
                return f"its files lack {shown([f'{layer}.{number}.{part}'])}; download it again"
        for part in parts:
            of_part = {number: found[number, part] for number in numbers}
            usual, _ = Counter(of_part.values()).most_common(1)[0]
            for number, shape in of_part.items():
                if shape != usual:
                    name = shown([f"{layer}.{number}.{part}"])
                    return f"{name} is {list(shape)} in its files and {list(usual)} for the other experts"
        for part, (gate, up) in product(parts, _JOINED):
            other = part.replace(gate, up)
            if other in parts and found["0", part] != found["0", other]:
                first, second = (f"{shown([f'{layer}.0.{p}'])} is {list(found['0', p])}" for p in (part, other))
                return f"{first} and {second} in its files, but the two must be alike; download it again"
    return None


def text_files(folder: Path, *, code: bool = False) -> list[Path]:
    """The configs, tokenizer files and templates in a folder and, with `code`, its Python files, sorted by name."""
    patterns = (*TEXTS, "*.py") if code else TEXTS
    return sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})


def read_config(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError if the file is unreadable or holds something else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: can't be read ({first_line(error)})") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: not a JSON object")
    return content


def shown(names: Iterable[str]) -> str:
    """The first few names in order, and the number of the others."""
    ordered = sorted(names)
    cut = [name if len(name) <= 120 else f"{name[:119]}…" for name in ordered[:_SHOWN]]
    return ", ".join(cut) + (f" and {len(ordered) - _SHOWN} more" if len(ordered) > _SHOWN else "")
