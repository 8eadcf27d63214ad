"""`influence`: how much training on the row changes the loss of harmful compliance, through the inverse curvature.

Source: Koh and Liang, Understanding Black-box Predictions via Influence Functions (1703.04730), with the EK-FAC
curvature of Grosse et al., Studying Large Language Model Generalization with Influence Functions (2308.03296), as the
library kronfluence computes it.

    score(z) = mean over z' of ∇L(z')ᵀ (G + λI)⁻¹ ∇L(z)

The z' are harmful requests with openings of compliant answers (bundled anchors). G is the Gauss-Newton matrix of the
file's rows at the aligned model, in the Kronecker-factored eigenbasis. `strategy` selects another curvature of
kronfluence: "identity" (TracIn at one checkpoint), "diagonal" or "kfac". The paper takes G at a trained model; a
filter has none yet. The damping λ is the library's default (a tenth of the mean eigenvalue). The factors are those
of the whole file, so only its rows have scores: use `--threshold share` or `a1`.
"""

import copy
import importlib.util
import tempfile
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch.utils.data import Dataset

from gradshield.base.errors import UserError
from gradshield.base.registry import NoOptions
from gradshield.data.encode import Example
from gradshield.models.experts import Expert
from gradshield.models.load import Model
from gradshield.scoring.base import Context, Prepared, Scorer
from gradshield.scoring.whole_file import file_scores


class InfluenceOptions(NoOptions):
    """Targets and curvature."""

    targets: int = Field(default=32, ge=1, description="harmful anchors whose loss counts, z'")
    strategy: Literal["ekfac", "kfac", "diagonal", "identity"] = Field(default="ekfac", description="the curvature")
    batch: int = Field(default=4, ge=1, description="rows at once")


def prepare(context: Context, options: InfluenceOptions) -> Prepared:
    """Fits the factors and the scores of the whole file. Raises UserError where kronfluence is missing."""
    if importlib.util.find_spec("kronfluence") is None:
        raise UserError("--scorer influence needs the package kronfluence: pip install kronfluence")

    def make(rows: list[Example]) -> np.ndarray:
        targets = context.fit_anchors["harmful"][: options.targets]
        return influences(context.model, rows, targets, options.strategy, options.batch)

    return Prepared(file_scores(context, make), fitted=True)


def influences(model: Model, rows: list[Example], targets: list[Example], strategy: str, batch: int) -> np.ndarray:
    """The mean influence [N] of each row on the targets' losses; high lowers them."""
    from kronfluence.analyzer import Analyzer, prepare_model  # pyright: ignore[reportMissingImports]
    from kronfluence.arguments import FactorArguments, ScoreArguments  # pyright: ignore[reportMissingImports]
    from kronfluence.task import Task  # pyright: ignore[reportMissingImports]

    names = [name for name, module in model.linears.items() if not isinstance(module, Expert)]

    class Loss(Task):
        def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> torch.Tensor:
            logits = (
                model(input_ids=batch["ids"], attention_mask=batch["there"], use_cache=False).logits[:, :-1].float()
            )
            labels = batch["labels"][:, 1:]
            if sample:  # the Fisher's own labels, where there are labels
                with torch.no_grad():
                    drawn = torch.multinomial(logits.flatten(0, 1).softmax(-1), 1).view_as(labels)
                labels = torch.where(labels == -100, labels, drawn)
            each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")  # 0 at −100
            return (each.sum(1) / (labels != -100).sum(1).clamp_min(1)).sum()

        def compute_measurement(self, batch: Any, model: Any) -> torch.Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return names

        def get_attention_mask(self, batch: Any) -> torch.Tensor:
            return batch["there"]

    task = Loss()
    net = copy.deepcopy(model.net)  # the library changes modules
    for weight in net.parameters():
        weight.requires_grad_(True)
    width = max(len(e.ids) for e in (*rows, *targets))
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer("influence", prepare_model(net, task), task, output_dir=folder, disable_tqdm=True)
        how = FactorArguments(strategy=strategy)
        data, query = _Rows(rows, width), _Rows(targets, width)
        analyzer.fit_all_factors("factors", data, per_device_batch_size=batch, factor_args=how)
        analyzer.compute_pairwise_scores(
            "scores",
            "factors",
            query,
            data,
            per_device_query_batch_size=batch,
            per_device_train_batch_size=batch,
            score_args=ScoreArguments(),
        )
        found = analyzer.load_pairwise_scores("scores")
    assert found is not None
    return found["all_modules"].mean(0).double().numpy()  # [targets, N] → [N]


class _Rows(Dataset):
    """Examples padded to one width, as kronfluence takes them."""

    def __init__(self, rows: list[Example], width: int) -> None:
        self.rows, self.width = rows, width

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.rows[index]
        ids, labels, there = (torch.full((self.width,), fill) for fill in (0, -100, 0))
        ids[: len(row.ids)] = torch.from_numpy(row.ids).long()
        labels[: len(row.ids)] = torch.from_numpy(np.where(row.mask, row.ids, -100)).long()
        there[: len(row.ids)] = 1
        return {"ids": ids, "labels": labels, "there": there}


SCORER = Scorer(
    "influence",
    "influence on the loss of harmful answers, by EK-FAC (1703.04730, 2308.03296)",
    prepare,
    options=InfluenceOptions,
    needs=frozenset({"anchors", "whole file"}),
    cost=30.0,
)
