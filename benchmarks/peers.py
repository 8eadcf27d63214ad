"""bergson and kronfluence on the same task, each through its own documented calls; neither is part of the package.

Both take the same rows, loss (mean over response tokens), S and weights, and make their own gradient of the probe; both
compute the logits of every token, as their documentation has it.
"""

import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.methods import Method, Outcome, Run, Task, dense_gradient, losses
from gradshield.data.encode import Example, encode_request

LOW_RANK = 64  # of kronfluence's query batching, as in the same example


def bergson(by_token: bool) -> Callable[[Task, Sequence[Example]], AbstractContextManager[Run]]:
    """`collect_gradients` with a `Scorer`: what `bergson score` runs, without reloading the model.

    The query is ∇S as a matrix of each Linear; bergson's own collector holds it in host memory several times over,
    which is too much for 8B weights. Per row (its default) it forms the row's gradient; per token (`attribute_tokens`)
    it does not, and the tokens' scores are summed.
    """

    @contextmanager
    def opened(task: Task, rows: Sequence[Example]) -> Iterator[Run]:
        from bergson import GradientProcessor, IndexConfig, Scorer, collect_gradients
        from bergson.data import allocate_batches
        from bergson.score.score_writer import InMemorySequenceScoreWriter, InMemoryTokenScoreWriter

        net, data = task.model.net, _dataset(rows)
        with tempfile.TemporaryDirectory() as folder, _quiet(), _trainable_embedding(net):
            config = IndexConfig(
                run_path=f"{folder}/run",
                token_batch_size=task.batch_tokens,
                loss_reduction="mean",
                attribute_tokens=by_token,
            )
            config.partial_run_path.mkdir()
            prefix = f"{net.base_model_prefix}."  # bergson names modules from the decoder on
            query = {name.removeprefix(prefix): g.reshape(1, -1) for name, g in dense_gradient(task).items()}
            allocated = allocate_batches(data["length"][:], config.token_batch_size)

            def run() -> Outcome:
                if by_token:
                    writer: Any = InMemoryTokenScoreWriter(data, 1)
                else:
                    writer = InMemorySequenceScoreWriter(len(rows), 1)
                scorer = Scorer(query, list(query), writer, task.model.device, net.dtype, attribute_tokens=by_token)
                collect_gradients(net, data, GradientProcessor(), config, batches=allocated, scorer=scorer)
                scores = [float(s.sum()) for s in writer.scores]
                return Outcome(np.array(scores))

            yield run

    return opened


def kronfluence(low_rank: int | None) -> Callable[[Task, Sequence[Example]], AbstractContextManager[Run]]:
    """`Analyzer.compute_pairwise_scores` with the identity in place of the Hessian, the probe as the only query.

    The probe's gradient is made in every call, as there is no other way in. Rows are sorted by length.
    """

    @contextmanager
    def opened(task: Task, rows: Sequence[Example]) -> Iterator[Run]:
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.arguments import FactorArguments
        from kronfluence.utils.common.score_arguments import default_score_arguments
        from kronfluence.utils.dataset import DataLoaderKwargs

        size = max(4, task.batch_tokens // 1024)  # rows; there is no token budget, and eight chats take 19 GB
        order = sorted(range(len(rows)), key=lambda n: -len(rows[n].ids))
        train: Any = [{"ids": rows[n].ids, "mask": rows[n].mask} for n in order]
        encoded = [encode_request(request, task.model.tokenizer) for request in task.requests]
        query: Any = [{"ids": ids, "mask": np.zeros(len(ids), dtype=bool)} for ids in encoded]
        net, work = task.model.net, _kronfluence_task(task)
        with tempfile.TemporaryDirectory() as folder, _quiet():
            try:
                analyzer = Analyzer(
                    "bench",
                    prepare_model(net, work),
                    work,
                    cpu=task.model.device.type == "cpu",
                    disable_tqdm=True,
                    output_dir=folder,
                )
                analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=_collate))
                factors = FactorArguments(strategy="identity")
                analyzer.fit_all_factors("identity", train, per_device_batch_size=size, factor_args=factors)
                arguments = default_score_arguments(query_gradient_low_rank=low_rank)
                for name in ("per_sample_gradient_dtype", "precondition_dtype", "score_dtype"):
                    setattr(arguments, name, net.dtype)

                def run() -> Outcome:
                    analyzer.compute_pairwise_scores(
                        "scores",
                        "identity",
                        query,
                        train,
                        per_device_query_batch_size=1,
                        per_device_train_batch_size=size,
                        score_args=arguments,
                        overwrite_output_dir=True,
                    )
                    found: Any = analyzer.load_pairwise_scores("scores")  # "all_modules": [probes, rows]
                    scores = np.zeros(len(rows))
                    scores[order] = found["all_modules"].double().mean(0).numpy()
                    return Outcome(scores)

                yield run
            finally:
                _unwrap(net)

    return opened


def _kronfluence_task(task: Task) -> Any:
    """The task as kronfluence wants it written: the summed training loss, the measurement, the modules."""
    from kronfluence.task import Task as Base

    class Fihs(Base):
        def compute_train_loss(self, batch: dict[str, Tensor], model: Any, sample: bool = False) -> Tensor:
            logits = model(input_ids=batch["ids"], use_cache=False).logits
            rows, where = batch["mask"].nonzero(as_tuple=True)
            weights = 1 / batch["mask"].sum(1)[rows].float()
            return losses(logits[rows, where - 1], rows, batch["ids"][rows, where], weights, len(logits)).sum()

        def compute_measurement(self, batch: dict[str, Tensor], model: Any) -> Tensor:
            return task.s(model(input_ids=batch["ids"], use_cache=False).logits[:, -1]).sum()

        def get_influence_tracked_modules(self) -> list[str]:
            return list(task.model.linears)

    return Fihs()


def _collate(records: list[dict[str, np.ndarray]]) -> dict[str, Tensor]:
    """ids and mask [B, T], padded on the right; the models are causal, so that no attention mask is needed."""
    longest = max(len(r["ids"]) for r in records)
    padded = {name: torch.zeros(len(records), longest, dtype=torch.long) for name in ("ids", "mask")}
    for n, record in enumerate(records):
        for name, values in padded.items():
            values[n, : len(record[name])] = torch.from_numpy(record[name].astype(np.int64))
    return {"ids": padded["ids"], "mask": padded["mask"].bool()}


def _unwrap(net: Any) -> None:
    """Takes kronfluence's wrappers off the model."""
    from kronfluence.module import TrackedModule

    for name, module in list(net.named_modules()):
        if isinstance(module, TrackedModule):
            parent, _, last = name.rpartition(".")
            setattr(net.get_submodule(parent), last, module.original_module)


def _dataset(rows: Sequence[Example]) -> Any:
    from datasets import Dataset

    return Dataset.from_list(
        [
            {
                "input_ids": row.ids.tolist(),
                "labels": np.where(row.mask, row.ids, -100).tolist(),
                "length": len(row.ids),
            }
            for row in rows
        ]
    )


@contextmanager
def _trainable_embedding(net: Any) -> Iterator[None]:
    """What bergson's own `setup_model_and_peft` does: all frozen but the embedding, so that there is a backward."""
    embedding = net.get_input_embeddings()
    embedding.requires_grad_(True)
    try:
        yield
    finally:
        embedding.requires_grad_(False)
        net.zero_grad()


@contextmanager
def _quiet() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


PEERS: dict[str, Method] = {
    "bergson": Method("bergson", bergson(by_token=False), ("bergson",), exact=True),
    "bergson-tokens": Method("bergson, per token", bergson(by_token=True), ("bergson",), exact=True),
    "kronfluence": Method("kronfluence", kronfluence(None), ("kronfluence.analyzer",), exact=True),
    "kronfluence-rank": Method(
        f"kronfluence, rank {LOW_RANK}", kronfluence(LOW_RANK), ("kronfluence.analyzer",), exact=True
    ),
}
