"""What each way to make scoring cheaper is worth, kept or not: one line a measurement, ratios from the same minute.

Everything is measured on the benchmark's kinds of rows. Time is given as a share of the plain way's, which is run right
before or after, on every third row; errors are shares of the largest score, beside Spearman's correlation with the
exact scores, over all rows.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.measure import loaded, machine
from benchmarks.methods import Task, by_batch, intent, losses_by_forward, make_task
from benchmarks.models import open_model
from benchmarks.plan import measured
from benchmarks.rows import mixed
from gradshield.base.assets import ASSETS
from gradshield.data.encode import Example
from gradshield.data.requests import read_requests
from gradshield.models.batching import batches
from gradshield.scoring.fihs.contraction import contract, random_directions
from gradshield.scoring.fihs.probe import ProbeGradient, probe_gradient
from gradshield.scoring.intent import reading as intent_score
from gradshield.study.kinds import data_folder

REPEATS = 2
TOLERANCES = (1e-3, 1e-2, 3e-2, 0.1)
PROBES = 64
Measurement = dict[str, Any]


def run(spec: str, file: Path, longest: int) -> None:
    """Makes every measurement that `file` does not hold yet."""
    data_folder()
    measured(file, {"lever": "machine"}, machine)
    task = make_task(open_model(spec))
    rows = mixed(task.model, 8, 1, longest)
    for lever, measure in LEVERS.items():
        measured(file, {"lever": lever}, lambda measure=measure: {"load": loaded(), "cells": list(measure(task, rows))})


def padding(task: Task, rows: Sequence[Example]) -> Iterator[Measurement]:
    """What concatenated rows would save: the share of a batch that is padding, rows sorted by length or not, in files
    of different sizes (the same rows over and over, which changes nothing about their lengths)."""
    for times in (1, 10, 100):
        many = [*rows] * times
        for name, order in (("by length", batches(many, task.batch_tokens)), ("as they come", _unsorted(many, task))):
            padded = sum(len(batch) * max(len(many[n].ids) for n in batch) for batch in order)
            yield {"rows": len(many), "batches": name, "padding": 1 - sum(len(e.ids) for e in many) / padded}


def lower_layers(task: Task, rows: Sequence[Example]) -> Iterator[Measurement]:
    """The score from the upper decoder blocks only, the backward ending at the lowest of them."""
    names = list(task.gradient.factors)
    every = np.zeros((len(rows), len(names)))
    for batch in batches(rows, task.batch_tokens):
        every[batch] = contract(task.model, [rows[n] for n in batch], task.gradient).dots.numpy()
    count = len(task.model.layers)
    for share in (0.0, 0.25, 0.5, 0.75, 0.9):
        first = int(share * count)
        inside = {id(m) for block in task.model.layers[first:] for m in block.modules()}
        above = [id(task.model.linears[name]) in inside for name in names]
        part = ProbeGradient({n: f for (n, f), upper in zip(task.gradient.factors.items(), above) if upper})
        ratio = _ratio(
            lambda part=part: _dots(task, rows[::3], part),
            lambda: by_batch(task, rows[::3], lambda batch: losses_by_forward(task, batch)),
        )
        agreement = _agreement(every[:, above].sum(1), every.sum(1))
        yield {"blocks left out": first, "of": count, "forward passes": ratio, **agreement}


def tolerance(task: Task, rows: Sequence[Example]) -> Iterator[Measurement]:
    """Many probes in one gradient: what recompression to a tolerance keeps, costs and errs, against one probe."""
    many = _probes()
    exact = None
    for value in (0.0, *TOLERANCES):
        start = time.perf_counter()
        gradient = probe_gradient(task.model, many, task.s, tolerance=value)
        made = time.perf_counter() - start
        scores = _dots(task, rows, gradient)
        ratio = _ratio(
            lambda gradient=gradient: _dots(task, rows[::3], gradient), lambda: _dots(task, rows[::3], task.gradient)
        )
        exact = scores if exact is None else exact
        ranks = [len(f.inp) for f in gradient.factors.values()]
        yield {"probes": len(many), "tolerance": value, "mean rank": float(np.mean(ranks)), "one probe's": ratio} | {
            "seconds to make": made,
            **_agreement(scores, exact),
        }


def norms(task: Task, rows: Sequence[Example]) -> Iterator[Measurement]:
    """The gradient's norm by random directions against the exact form, token by token, and the scores that follow."""

    some = rows[::3]

    def total(**way: Any) -> np.ndarray:
        return by_batch(task, some, lambda batch: contract(task.model, batch, task.gradient, **way).norms.sum(1).sqrt())

    def normalised(**way: Any) -> np.ndarray:
        def one(batch: list[Example]) -> Tensor:
            found = contract(task.model, batch, task.gradient, **way)
            return (found.dots / found.norms.sqrt()).mean(1)

        return by_batch(task, some, one)

    exact, scores = total(exact_norms=True), normalised(exact_norms=True)
    for count in (4, 16, 64):
        random = random_directions(task.gradient.factors, count)
        error = np.abs(total(random=random) / exact - 1)
        ratio = _ratio(lambda random=random: total(random=random), lambda: total(exact_norms=True))
        yield {"directions": count, "exact way's": ratio, "mean error": float(error.mean())} | {
            "largest error": float(error.max()),
            "module": _agreement(normalised(random=random), scores),
        }


def shared_prefix(task: Task, rows: Sequence[Example]) -> Iterator[Measurement]:
    """The default score with what all rows of a batch open with computed once, against each row on its own."""

    def alone() -> None:
        before, intent_score.MIN_SHARED_TOKENS = intent_score.MIN_SHARED_TOKENS, 10**9
        try:
            _intent(task, rows)
        finally:
            intent_score.MIN_SHARED_TOKENS = before

    yield {"without it": _ratio(lambda: _intent(task, rows), alone)}


def checkpointing(task: Task, rows: Sequence[Example]) -> Iterator[Measurement]:
    """Every block computed again in the backward instead of its activations kept."""

    def anew() -> None:
        by_batch(task, rows[::3], lambda batch: contract(task.model, batch, task.gradient, recompute=True).dots.sum(1))

    yield {"without it": _ratio(anew, lambda: _dots(task, rows[::3], task.gradient))}


def compiled(task: Task, rows: Sequence[Example]) -> Iterator[Measurement]:
    """torch.compile on the bare network (hooks left out), one shape, with what compiling took."""
    ids = torch.from_numpy(np.stack([np.resize(e.ids, 128) for e in rows[:8]])).long().to(task.model.device)
    net = task.model.net.model
    start = time.perf_counter()
    try:
        fast = torch.compile(net, dynamic=False)
        with torch.no_grad():
            fast(input_ids=ids, use_cache=False)
    except Exception as error:  # whatever the compiler's tools lack
        yield {"error": " ".join(str(error).split())[:200]}
        return
    seconds = time.perf_counter() - start

    @torch.no_grad()
    def one(net: Any) -> None:
        net(input_ids=ids, use_cache=False)

    yield {"pass": "forward", "seconds to compile": seconds, "eager": _ratio(lambda: one(fast), lambda: one(net))}


def forward_mode(task: Task, rows: Sequence[Example]) -> Iterator[Measurement]:
    """The score as the derivative of the loss along ∇S, carried along in one forward pass, against the contraction."""
    some = rows[::3]
    factors = {name: f for name, f in task.gradient.factors.items() if len(f.inp)}

    def attach(name: str) -> Callable[..., Tensor]:
        inp, out = factors[name].inp.T.contiguous(), factors[name].out

        def hook(_module: Any, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
            value, tangent = forward_ad.unpack_dual(y)
            along = (forward_ad.unpack_dual(args[0]).primal @ inp) @ out  # ∇S x
            return forward_ad.make_dual(value, along if tangent is None else along + tangent)

        return hook

    @torch.no_grad()  # of reverse mode only
    def one(batch: list[Example]) -> Tensor:
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):  # the only attention that knows tangents
            return forward_ad.unpack_dual(losses_by_forward(task, batch)).tangent

    handles = [task.model.linears[name].register_forward_hook(attach(name)) for name in factors]
    try:
        scores = by_batch(task, some, one)
        seconds = _seconds(lambda: by_batch(task, some, one))
    finally:
        for handle in handles:
            handle.remove()
    passes = _seconds(lambda: by_batch(task, some, lambda batch: losses_by_forward(task, batch)))
    contraction = _seconds(lambda: _dots(task, some, task.gradient))
    yield {"forward passes": seconds / passes, "the contraction's": seconds / contraction} | _agreement(
        scores, _dots(task, some, task.gradient)
    )


LEVERS: dict[str, Callable[[Task, Sequence[Example]], Iterator[Measurement]]] = {
    "padding-free batches": padding,
    "lower layers without a gradient": lower_layers,
    "recompression of many probes": tolerance,
    "norms by random directions": norms,
    "shared prefix": shared_prefix,
    "activation checkpointing": checkpointing,
    "torch.compile": compiled,
    "forward mode": forward_mode,
}


def _probes() -> list[str]:
    many = read_requests(ASSETS / "probes.jsonl")[:PROBES]
    return many + read_requests(ASSETS / "requests_harmful.jsonl")[: PROBES - len(many)]


def _dots(task: Task, rows: Sequence[Example], gradient: ProbeGradient) -> np.ndarray:
    return by_batch(task, rows, lambda batch: contract(task.model, batch, gradient).dots.sum(1))


def _intent(task: Task, rows: Sequence[Example]) -> None:
    with intent(task, rows) as once:
        once()


def _ratio(one: Callable[[], Any], other: Callable[[], Any]) -> list[float]:
    """Time of `one` over that of `other`, taken in turns: the mean, the least and the largest."""
    found = []
    for repeat in range(REPEATS):
        seconds = {}
        for way in (one, other) if repeat % 2 == 0 else (other, one):
            seconds[way] = _seconds(way)
        found.append(seconds[one] / seconds[other])
    return [float(np.mean(found)), min(found), max(found)]


def _seconds(way: Callable[[], Any]) -> float:
    start = time.perf_counter()
    way()
    return time.perf_counter() - start


def _agreement(found: np.ndarray, exact: np.ndarray) -> Measurement:
    return {
        "largest error": float(np.abs(found - exact).max() / np.abs(exact).max()),
        "spearman": float(spearmanr(found, exact).statistic),
    }


def _unsorted(rows: Sequence[Example], task: Task) -> list[list[int]]:
    """Rows in the order of a shuffled file, as many a batch as its token budget takes."""
    result: list[list[int]] = []
    for n in np.random.default_rng(0).permutation(len(rows)).tolist():
        longest = max(len(rows[i].ids) for i in [n, *(result[-1] if result else [])])
        if result and (len(result[-1]) + 1) * longest <= task.batch_tokens:
            result[-1].append(n)
        else:
            result.append([n])
    return result
