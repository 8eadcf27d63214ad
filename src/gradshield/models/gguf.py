"""A GGUF file's header, read within bounds before any library maps the file: one file, whole, with no tensor hidden.

Readers of this format trust its counts and offsets; here, each is compared with the file's size first.
"""

import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO
from unittest.mock import patch

import numpy as np

from gradshield.base.errors import UserError, first_line
from gradshield.models.files import Shapes, shown

_FORMATS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}  # of values, by type
_STRING, _ARRAY = 8, 9
ROPE_FACTORS = "rope_freqs.weight"  # what the rotary frequencies of Llama 3.1 and later are divided by
_LONGEST = 2**24  # bytes of a name or a string: a chat template has some ten thousand


@dataclass(frozen=True)
class Header:
    """What is read of a GGUF file: its values (of an array, the length) and its tensors."""

    values: dict[str, Any]
    shapes: Shapes


def is_gguf(path: Path) -> bool:
    """Whether the file starts like a GGUF file, whatever its name."""
    try:
        if not path.is_file():  # a pipe's opening never ends
            return False
        with path.open("rb") as stream:
            return stream.read(4) == b"GGUF"
    except (OSError, ValueError):  # of a name with a NUL
        return False


def gguf_header(path: Path) -> Header:
    """The header of a GGUF file. Raises UserError for a file that is cut short, contradicts itself, is one of several
    parts, or can't be read."""
    try:
        with path.open("rb") as stream:
            header = _Reader(stream, path.stat().st_size).header()
    except OSError as error:
        raise UserError(f"{path}: can't be read ({first_line(error)})") from error
    except (ValueError, UnicodeDecodeError, struct.error) as error:
        raise UserError(f"{path}: not a whole GGUF file ({first_line(error)}); download it again") from None
    parts = header.values.get("split.count", 1)
    if parts != 1:
        number = header.values.get("split.no", 0)
        raise UserError(
            f"{path}: part {number + 1 if isinstance(number, int) else '?'} of {parts}; merge the parts first "
            "(llama-gguf-split --merge)"
        )
    _refuse_scaled_positions(path, header.values)
    end, tokens = (header.values.get(f"tokenizer.ggml.{name}") for name in ("eos_token_id", "tokens"))
    if isinstance(end, int) and isinstance(tokens, int) and not 0 <= end < tokens:
        raise UserError(f"{path}: its end token has number {end}, but it has only {tokens} tokens")
    return header


def _refuse_scaled_positions(path: Path, values: dict[str, Any]) -> None:
    """Raises UserError for rotary positions that are divided, as for a longer context: transformers leaves that out."""
    architecture = values.get("general.architecture")
    kind = values.get(f"{architecture}.rope.scaling.type", "linear")
    for name in ("scaling.factor", "scale_linear", "scaling.attn_factor"):
        key = f"{architecture}.rope.{name}"
        factor = values.get(key)
        if factor not in (None, 0, 1) and kind != "none" and architecture != "gpt-oss":  # whose scaling it does read
            raise _ignored(path, f"{key} = {factor}")


def _ignored(path: Path, what: str) -> UserError:
    return UserError(f"{path}: {what} is ignored by transformers, which changes the model; use its safetensors")


@contextmanager
def alone(source: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The keywords of from_pretrained, with a GGUF file linked into an empty folder. transformers would apply an
    adapter beside the file, and prefer a tokenizer there to the file's own."""
    if "gguf_file" not in source:
        yield source
        return
    with TemporaryDirectory(prefix="gradshield-") as folder:
        path = Path(source["pretrained_model_name_or_path"]) / source["gguf_file"]
        (Path(folder) / "model.gguf").symlink_to(path.absolute())
        yield {"pretrained_model_name_or_path": folder, "gguf_file": "model.gguf"}


@contextmanager
def shared_reader() -> Iterator[None]:
    """Within it, transformers shares one reader of a GGUF file, and one map of its tensors' names, and reads strings
    quickly.

    It opens the file four times, parses its values each time, and makes the map for each module. A vocabulary and its
    merges have some hundred thousand strings. The reader slices a plain array here: a slice of a memory map takes ten
    times as long.
    """
    import gguf
    from transformers import modeling_gguf_pytorch_utils as reading

    parse_value: Any = getattr(reading, "_gguf_parse_value", None)
    in_order = lru_cache(lambda dtype, order: np.dtype(dtype).newbyteorder(order))

    def parse(part: Any, types: Any) -> Any:  # transformers makes a list of a string's bytes first
        return part.tobytes().decode() if types[-1] == _STRING else parse_value(part, types)

    class Reader(gguf.GGUFReader):
        @property
        def data(self) -> Any:
            return self._data

        @data.setter
        def data(self, value: Any) -> None:
            self._data = np.asarray(value)

        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            kind = in_order(dtype, override_order or self.byte_order)
            return self._data[offset : offset + kind.itemsize * int(count)].view(kind)

    with (
        patch.object(reading, "_gguf_parse_value", parse, create=True),  # private: another version may lack it
        patch.object(gguf, "GGUFReader", lru_cache(Reader)),
        patch.object(gguf, "get_tensor_name_map", lru_cache(gguf.get_tensor_name_map)),
    ):
        yield


def apply_rope_factors(net: Any, path: Path, shapes: Shapes) -> None:
    """Divides the rotary frequencies of `net` by the factors in its file, as llama.cpp does and transformers does not.

    Raises UserError where the network has no frequencies that they fit.
    """
    if ROPE_FACTORS not in shapes:
        return
    import torch
    from gguf import GGUFReader

    (tensor,) = (each for each in GGUFReader(path).tensors if each.name == ROPE_FACTORS)
    factors = torch.tensor(tensor.data.tolist())  # [head width / 2]
    names = ("inv_freq", "original_inv_freq")
    found = [buffer for name, buffer in net.named_buffers() if name.split(".")[-1] in names]
    if not found or any(buffer.shape != factors.shape for buffer in found):
        raise UserError(f"{path}: {ROPE_FACTORS} {list(factors.shape)} doesn't fit the model's rotary frequencies")
    for buffer in found:
        buffer.div_(factors.to(buffer))


def refuse_ignored(net: Any, path: Path) -> None:
    """Raises UserError for a value of a GGUF file that the network made of it doesn't have."""
    values, config = gguf_header(path).values, net.config.get_text_config()
    architecture = values.get("general.architecture")
    rope = getattr(config, "rope_parameters", None) or {}
    ropes = [rope, *(part for part in rope.values() if isinstance(part, dict))]  # one for each kind of layer
    epsilons = [getattr(module, key, None) for module in net.modules() for key in ("eps", "variance_epsilon")]
    used = {
        "rope.freq_base": [each.get("rope_theta") for each in ropes],
        "rope.dimension_count": [2 * len(buffer) for name, buffer in net.named_buffers() if name.endswith("inv_freq")],
        "attention.layer_norm_epsilon": epsilons,
        "attention.layer_norm_rms_epsilon": epsilons,
        "attn_logit_softcapping": [getattr(config, "attn_logit_softcapping", None) or 0],
        "final_logit_softcapping": [getattr(config, "final_logit_softcapping", None) or 0],
        "attention.key_length": [getattr(config, "query_pre_attn_scalar", None)],
        "attention.scale": [*(getattr(module, "scaling", None) for module in net.modules()), 0],
        "attention.max_alibi_bias": [8 if config.model_type == "bloom" else 0],
        "attention.clamp_kqv": [0],
        "ssm.dt_b_c_rms": [0],
        **{key: [1] for key in ("logit_scale", "residual_scale", "embedding_scale", "expert_weights_scale")},
    }
    if not values.get(f"{architecture}.attention.causal", True):
        raise _ignored(path, f"{architecture}.attention.causal = false")
    if (architecture, config.num_hidden_layers) in (("gemma2", 46), ("gemma3", 62)):
        # llama.cpp scales attention in these two by the width per head, in others by a key's length.
        if config.query_pre_attn_scalar != config.hidden_size / config.num_attention_heads:
            raise _ignored(path, f"the scale of attention in {architecture} of {config.num_hidden_layers} layers")
        del used["attention.key_length"]
    for name, numbers in used.items():
        key = f"{architecture}.{name}"
        value, numbers = values.get(key), [number for number in numbers if isinstance(number, int | float)]
        same = any(math.isclose(value or 0, number, rel_tol=1e-4) for number in numbers)
        if value and numbers and not same:
            raise _ignored(path, f"{key} = {value}")


class _Reader:
    """Reads a stream of known size from its start. Reading past its end is a ValueError."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self.stream, self.size = stream, size

    def header(self) -> Header:
        if self.stream.read(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        (version,) = self.take("I")
        if version not in (2, 3):
            raise ValueError(f"version {version}, not 2 or 3")
        tensors, count = self.take("QQ")
        if 24 + 13 * count + 24 * tensors > self.size:
            raise ValueError(f"{tensors} tensors and {count} values don't fit into {self.size} bytes")
        values: dict[str, Any] = {}
        for _ in range(count):
            name = self.string()
            if name in values:
                raise ValueError(f"{name[:80]} is there twice")
            (kind,) = self.take("I")
            values[name] = self.value(kind)
        return Header(values, self.shapes(tensors, values.get("general.alignment", 32)))

    def shapes(self, count: int, alignment: Any) -> Shapes:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        found: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(count):
            name = self.string()
            (dimensions,) = self.take("I")
            if not 0 < dimensions <= 8:
                raise ValueError(f"{name[:80]} has {dimensions} dimensions")
            shape = self.take("Q" * dimensions)[::-1]
            kind, offset = self.take("IQ")
            if name in found:
                raise ValueError(f"{name[:80]} is there twice")
            block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
            if shape[-1] % block:
                raise ValueError(f"{name[:80]} has rows of {shape[-1]}, not of whole blocks of {block}")
            found[name] = shape, offset, math.prod(shape) // block * size
        if not found:
            raise ValueError("it holds no tensors")
        if not isinstance(alignment, int) or not 0 < alignment <= 2**16 or alignment & (alignment - 1):
            raise ValueError(f"alignment {alignment}")
        start = -(-self.stream.tell() // alignment) * alignment
        if short := [name for name, (_, offset, size) in found.items() if start + offset + size > self.size]:
            raise ValueError(f"{shown(short)} lies beyond its end")
        return {name: shape for name, (shape, _, _) in found.items()}

    def value(self, kind: int, keep: bool = True) -> Any:
        if kind in _FORMATS:
            return self.take(_FORMATS[kind])[0]
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise ValueError(f"a value of type {kind}")
        inner, count = self.take("IQ")
        if inner in _FORMATS:
            self.skip(count * struct.calcsize(f"<{_FORMATS[inner]}"))
        elif inner == _STRING:
            for _ in range(count):
                self.skip(self.take("Q")[0])
        else:
            raise ValueError(f"an array of type {inner}")
        return count

    def string(self) -> str:
        (length,) = self.take("Q")
        if length > min(_LONGEST, self.size - self.stream.tell()):
            raise ValueError(f"a text of {length} bytes")
        return self.stream.read(length).decode("utf-8")

    def take(self, form: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{form}", self.stream.read(struct.calcsize(f"<{form}")))

    def skip(self, count: int) -> None:
        if self.stream.tell() + count > self.size:
            raise ValueError(f"{count} bytes more than it has")
        self.stream.seek(count, 1)
