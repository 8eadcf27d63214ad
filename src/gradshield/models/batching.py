"""Examples as padded tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradshield.data.encode import Example


def pad(batch: Sequence[Example], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(ids [B, T] padded on the right, and for each response token its row, the position that predicts it, its id,
    and 1 / number of its row's response tokens)."""
    ids = torch.zeros(len(batch), max(len(e.ids) for e in batch), dtype=torch.long)
    rows, positions, targets, weights = [], [], [], []
    for row, example in enumerate(batch):
        ids[row, : len(example.ids)] = torch.from_numpy(example.ids)
        where = torch.from_numpy(example.mask).nonzero().flatten()
        rows.append(torch.full_like(where, row))
        positions.append(where - 1)
        targets.append(ids[row, where])
        weights.append(torch.full((len(where),), 1 / len(where)))
    return (
        ids.to(device),
        torch.cat(rows).to(device),
        torch.cat(positions).to(device),
        torch.cat(targets),
        torch.cat(weights),
    )
