"""FIHS without a backward pass: two passes of llama.cpp with the probe's gradient as a LoRA adapter at ±ε.

An experiment (`python -m benchmarks llamacpp`, needs llama-cpp-python): how well a central difference on an inference
engine agrees with the exact score, at which ε, with which weights, and what it costs beside the exact contraction.
"""

import ctypes
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from benchmarks.measure import loaded, machine, run_once
from benchmarks.methods import Task, make_task
from benchmarks.models import open_model
from benchmarks.plan import measured
from benchmarks.rows import mixed, tokens_of
from gradshield.data.encode import Example
from gradshield.models.batching import batches
from gradshield.models.load import EMBEDDED, Model, embedded_gguf
from gradshield.study.kinds import data_folder

WEIGHTS = ("F32", "Q8_0", "Q4_1")
STEPS = (0.3, 0.1, 3e-2)  # ‖ε ∇S‖ over all weights
NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"} | {
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def run(file: Path, longest: int) -> None:
    """Makes every measurement that `file` does not hold yet, with the embedded model."""
    data_folder()
    measured(file, {"engine": "machine"}, machine)
    task = make_task(open_model(EMBEDDED, "cpu"))
    rows = mixed(task.model, 4, 1, longest)
    exact = measured(file, {"engine": "transformers", "rows": len(rows)}, partial(_exact, task, rows))
    with tempfile.TemporaryDirectory() as folder:
        adapter = Path(folder) / "probe.gguf"
        norm = write_adapter(task, adapter)
        for weights in WEIGHTS:
            model = Path(folder) / f"{weights}.gguf"
            write_model(task.model, model, weights)
            with opened(model, adapter) as engine:
                for step in STEPS:
                    key = {"engine": "llama.cpp", "weights": weights, "step": step, "rows": len(rows)}
                    measured(file, key, partial(_central, engine, rows, step / norm, exact))


def _exact(task: Task, rows: Sequence[Example]) -> dict[str, Any]:
    forward, ours = (run_once(task, name, rows) for name in ("forward", "paper"))
    assert ours.scores is not None
    return {"forward": forward.seconds, "seconds": ours.seconds, "tokens": tokens_of(rows), "load": loaded()} | {
        "scores": ours.scores.tolist()
    }


def _central(engine: Any, rows: Sequence[Example], step: float, exact: dict[str, Any]) -> dict[str, Any]:
    start = time.perf_counter()
    scores = (losses(engine, rows, step) - losses(engine, rows, -step)) / (2 * step)
    seconds = time.perf_counter() - start
    known = np.array(exact["scores"])
    return {"seconds": seconds, "load": loaded(), "scores": scores.tolist()} | {
        "spearman": float(spearmanr(scores, known).statistic),
        "pearson": float(np.corrcoef(scores, known)[0, 1]),
        "forward passes": seconds / exact["forward"],
        "exact way's": seconds / exact["seconds"],
    }


@contextmanager
def opened(model: Path, adapter: Path, tokens: int = 2048) -> Iterator[tuple[Any, Any, Any]]:
    """(vocabulary's size, context, adapter) of llama.cpp, with room for `tokens` tokens at once, keys in 32 bits."""
    import llama_cpp

    llama_cpp.llama_log_set(_quiet, None)
    params = llama_cpp.llama_model_default_params()
    net = llama_cpp.llama_model_load_from_file(str(model).encode(), params)
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = settings.n_batch = tokens
    settings.n_seq_max, settings.kv_unified = 128, True
    settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
    settings.type_k = settings.type_v = llama_cpp.GGML_TYPE_F32
    context = llama_cpp.llama_init_from_model(net, settings)
    lora = llama_cpp.llama_adapter_lora_init(net, str(adapter).encode())
    try:
        yield llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(net)), context, lora
    finally:
        llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(net)


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def _quiet(_level: int, _text: bytes, _data: Any) -> None:
    return


def losses(engine: tuple[Any, Any, Any], rows: Sequence[Example], scale: float) -> np.ndarray:
    """Mean next-token cross-entropy of every row's response tokens, float64, with the adapter at `scale`."""
    import llama_cpp

    size, context, lora = engine
    llama_cpp.llama_set_adapters_lora(
        context, (llama_cpp.llama_adapter_lora_p_ctypes * 1)(lora), 1, (ctypes.c_float * 1)(scale)
    )
    result = np.zeros(len(rows))
    for chunk in batches(rows, llama_cpp.llama_n_ctx(context)):
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        found = [e for n in chunk for e in [rows[n]]]
        count = sum(len(e.ids) for e in found)
        batch = llama_cpp.llama_batch_init(count, 0, 1)
        batch.n_tokens = place = count
        place, asked = 0, []
        for sequence, example in enumerate(found):
            read = np.append(example.mask[1:], False)  # whose next token has a loss
            for position, token in enumerate(example.ids.tolist()):
                batch.token[place], batch.pos[place] = token, position
                batch.n_seq_id[place], batch.seq_id[place][0] = 1, sequence
                batch.logits[place] = bool(read[position])
                if read[position]:
                    asked.append((place, chunk[sequence], int(example.ids[position + 1]), int(example.mask.sum())))
                place += 1
        if llama_cpp.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")
        for place, row, target, tokens in asked:
            logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, place), (size,)).astype(np.float64)
            top = logits.max()
            result[row] += (top + np.log(np.exp(logits - top).sum()) - logits[target]) / tokens
        llama_cpp.llama_batch_free(batch)
    return result


def write_adapter(task: Task, file: Path) -> float:
    """The probe's gradient as a LoRA adapter in GGUF (B A = ∇S at scale 1); returns its norm over all weights."""
    from gguf import GGUFWriter

    writer = GGUFWriter(str(file), "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 0.0)  # 0: the scale alone counts, not alpha over rank
    for name, factors in task.gradient.factors.items():
        into = _gguf_name(name)
        out = _permuted(into, factors.out.T.numpy(), task.model.net.config)
        writer.add_tensor(f"{into}.lora_a", np.ascontiguousarray(factors.inp.numpy(), dtype=np.float32))
        writer.add_tensor(f"{into}.lora_b", np.ascontiguousarray(out, dtype=np.float32))
    _close(writer)
    return sum(float(f.dense().square().sum()) for f in task.gradient.factors.values()) ** 0.5


def write_model(model: Model, file: Path, weights: str) -> None:
    """The model, its alignment adapter merged, as GGUF with the Linears in the type `weights`, all else in float32."""
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, dequantize, quantize

    folder, name = embedded_gguf()
    reader, writer = GGUFReader(str(Path(folder) / name)), GGUFWriter(str(file), "llama")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        of = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=of)
    kind = GGMLQuantizationType[weights]
    linears = {_gguf_name(name): module.weight.detach().numpy() for name, module in model.linears.items()}
    for tensor in reader.tensors:
        weight = linears.get(tensor.name)
        if weight is None:
            writer.add_tensor(tensor.name, dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
        else:
            weight = np.ascontiguousarray(_permuted(tensor.name, weight, model.net.config))
            data = weight if weights == "F32" else quantize(weight, kind)
            writer.add_tensor(tensor.name, data, raw_dtype=kind)
    _close(writer)


def _close(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(name: str) -> str:
    """model.layers.3.self_attn.q_proj → blk.3.attn_q.weight."""
    number, _, rest = name.partition("layers.")[2].partition(".")
    return f"blk.{number}.{NAMES[rest]}.weight"


def _permuted(name: str, weight: np.ndarray, config: Any) -> np.ndarray:
    """The rows [d_out, ·] as llama.cpp's rotary embedding wants them: pairs side by side, not in two halves."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(name.split(".")[2])
    if heads is None:
        return weight
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)
