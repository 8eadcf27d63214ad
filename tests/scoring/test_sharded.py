"""A model sharded over processes by FSDP scores as it does in one process; every process scores its own rows.

Run as a program, this file is one of those processes.
"""

import json
import sys

import numpy as np
import pytest
import torch
from conftest import freeze, random_examples, random_readouts, tiny_net, tiny_tokenizer
from scoring.gradients import REQUESTS, S, moe
from training.launch import start

import gradshield.models.hooks as hooks
from gradshield.scoring.fihs.contraction import contract, random_directions
from gradshield.scoring.fihs.probe import probe_gradient
from gradshield.scoring.intent.reading import read_batch


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "qwen3", "first"])
def test_every_process_of_fsdp_scores_its_rows_as_one_process_does(kind):
    for code, said, error in start(kind, program=(__file__,)):
        assert code == 0, error
        assert max(json.loads(said)) < 1e-5


def tokens(model, readouts, batch) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([row.tokens for row in read_batch(model, readouts, batch)]))


def main(kind: str) -> None:
    """Prints the largest relative errors of dots, norms and probe; processes run an equal number of batches."""
    import torch.distributed as dist
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.tensor import DTensor

    dist.init_process_group("gloo")
    tokenizer = tiny_tokenizer()
    model = freeze("tiny", tiny_net(tokenizer), tokenizer) if kind in ("dense", "first") else moe(kind)
    rows = random_examples(12, len(tokenizer))
    probe = probe_gradient(model, REQUESTS, S)
    random = random_directions(probe.factors, 4)
    expected = contract(model, rows, probe, random)
    own = list(range(dist.get_rank(), len(rows), dist.get_world_size()))
    batches = [[rows[n] for n in own[:2]], [rows[n] for n in own[2:]]]
    readouts = random_readouts(model)
    read = [tokens(model, readouts, batch) for batch in batches]
    if kind == "first":  # what accelerate does unless it is told otherwise; its weights are flat pieces
        hooks.LOGITS["cpu"] = 1000
        whole = FullyShardedDataParallel(model.net, use_orig_params=True, device_id=torch.device("cpu"))
        model.__dict__["net"] = whole  # its layers and Linears are known already, by the names they had
    else:
        for layer in model.layers:
            fully_shard(layer)
        fully_shard(model.net)
    shared = [tokens(model, readouts, batch) for batch in batches]  # which leaves the forward in the middle
    found = [contract(model, batch, probe, random) for batch in batches]
    again = probe_gradient(model, REQUESTS, S)
    assert kind == "first" or all(isinstance(weight, DTensor) for weight in model.net.parameters())
    pairs = [
        (torch.cat([f.dots for f in found]), expected.dots[own]),
        (torch.cat([f.norms for f in found]), expected.norms[own]),
        *zip(shared, read),
        *((again.factors[name].dense(), f.dense()) for name, f in probe.factors.items() if len(f.inp)),
    ]
    print(json.dumps([float((one - other).abs().max() / other.abs().max()) for one, other in pairs]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
