"""The tokens of a batch follow from the device, and memory of one batch is kept for the next."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from gradshield.models.load import load_model
from gradshield.models.memory import CPU_TOKENS, MAX_TOKENS, automatic_tokens

KEPT = """
import resource, torch
from gradshield.models.memory import keep_memory
keep_memory()
def fill(count):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(count)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(fill(25_000_000), sum(fill(n * 1_000_000) for n in range(24, 16, -1)))
"""


def test_a_model_on_a_cpu_has_the_batch_of_a_cpu_unless_told(tiny_folder):
    assert load_model(tiny_folder, device="cpu").batch_tokens == CPU_TOKENS
    assert load_model(tiny_folder, device="cpu", batch_tokens=77).batch_tokens == 77


@pytest.mark.parametrize(
    ("gib", "hidden", "layers", "weights", "tokens"),
    [
        (140, 4096, 32, 15, 125 * 64),  # 8 MiB a token
        (24, 4096, 32, 15, 9 * 64),
        (140, 1536, 28, 3, MAX_TOKENS),
        (4, 4096, 32, 15, CPU_TOKENS),  # weights spread over other devices
    ],
)
def test_a_gpus_batch_follows_from_its_memory(tiny, monkeypatch, gib, hidden, layers, weights, tokens):
    total = SimpleNamespace(total_memory=gib * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: total)
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(hidden_size=hidden, num_hidden_layers=layers))
    net = SimpleNamespace(config=config, dtype=torch.bfloat16, get_memory_footprint=lambda: weights * 2**30)
    assert automatic_tokens(net, torch.device("cuda")) == tokens


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_freed_memory_is_kept_for_the_next_batch():
    ran = subprocess.run([sys.executable, "-c", KEPT], capture_output=True, text=True, check=True)
    first, further = map(int, ran.stdout.split())
    assert first > 10_000 and further < first  # six times as many where each goes back to the system


RETURNED = """
import numpy as np
from gradshield.models.memory import keep_memory, return_memory

def resident():
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[1]) * 4096 >> 20

keep_memory()
pieces = [np.ones(1 << 17) for _ in range(300)]  # 1 MB each
held = resident()
del pieces
kept = resident()
return_memory()
print(held, kept, resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_memory_that_was_kept_goes_back_when_it_is_returned():
    ran = subprocess.run([sys.executable, "-c", RETURNED], capture_output=True, text=True, check=True)
    held, kept, returned = map(int, ran.stdout.split())
    assert kept > held - 30 and returned < kept - 200
