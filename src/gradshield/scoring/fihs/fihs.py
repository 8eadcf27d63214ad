"""`fihs`: the paper's score (eq. 4) and its normalised forms, as a registered scorer."""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from gradshield.base.assets import ASSETS
from gradshield.base.errors import UserError
from gradshield.base.registry import NoOptions, make_options, parse_spec
from gradshield.data.encode import Example
from gradshield.data.requests import read_requests
from gradshield.models.load import Model
from gradshield.scoring.base import Context, Prepared, ScoreFunction, Scorer
from gradshield.scoring.fihs.autograd import autograd_scorer
from gradshield.scoring.fihs.descent import first_tokens
from gradshield.scoring.fihs.probe import (
    ProbeGradient,
    SafetyScore,
    inner,
    margin,
    minus,
    own_tokens,
    paper_tokens,
    probe_gradient,
)
from gradshield.scoring.fihs.scorer import fihs_scorer

COLUMN = {"none": "paper", "cosine": "cosine", "module": "module"}


class FihsOptions(NoOptions):
    """The forms of FIHS. The defaults are the paper's."""

    normalise: Literal["none", "cosine", "module"] = Field(
        default="none", description="divide by the norm of the row's gradient: not at all, once, or module by module"
    )
    s: Literal["paper", "own"] = Field(default="paper", description="S: I − Sure (eq. 5), or the model's own tokens")
    contrast: Literal["none", "minus", "orthogonal"] = Field(
        default="none", description="subtract the gradient of harmless probes, or project it out"
    )
    weights: Literal["linear", "lora", "all"] = Field(
        default="linear", description="the decoder's Linears, a LoRA adapter's weights, or all weights (slow)"
    )
    mapping: Literal["identity", "sign"] = Field(
        default="identity", description="g of eq. 4: the gradient, or its sign as in Adam's first step (slow)"
    )
    probes: int = Field(default=12, ge=1, description="probes whose mean gradient is used")
    tokens: int | None = Field(default=None, ge=1, description="response tokens whose loss counts (default: all)")


def fihs_options(spec: str) -> FihsOptions:
    """The options of the run's scorer if it is FIHS, else the defaults, since FIHS explains rows of any scorer."""
    name, given = parse_spec(spec)
    return make_options(FihsOptions, given, f"--scorer {name}") if name == SCORER.name else FihsOptions()


def prepare(context: Context, options: FihsOptions) -> Prepared:
    """Takes ∇S at the probes that the model refuses. Raises UserError for options that exclude each other."""
    model, usable = context.model, context.probes
    s = safety_score(model, usable, options)
    probes, column = usable[: options.probes], COLUMN[options.normalise]
    if options.weights != "all" and options.mapping != "sign":
        gradient = probe_gradient(model, probes, s)
        harmless = harmless_part(model, [gradient], s, options)
        gradient = minus(gradient, *harmless) if harmless else gradient
        return Prepared(
            _shortened(fihs_scorer(model, gradient, column, lora=options.weights == "lora"), options.tokens)
        )
    if options.normalise == "module" or options.contrast == "orthogonal" or options.weights == "lora":
        raise UserError(
            "--scorer fihs: weights=all and mapping=sign exclude normalise=module, contrast=orthogonal and weights=lora"
        )
    against = _harmless(options) if options.contrast == "minus" else ()
    slow = autograd_scorer(model, probes, s, against=against, weights=options.weights, mapping=options.mapping)

    def scored(batch: Sequence[Example]) -> Mapping[str, np.ndarray]:
        columns = slow(batch)
        return columns | {"score": columns[column]}

    return Prepared(_shortened(scored, options.tokens))


def _shortened(score: ScoreFunction, tokens: int | None) -> ScoreFunction:
    """The score of rows that end after so many response tokens."""
    return score if tokens is None else lambda batch: score([first_tokens(e, tokens) for e in batch])


def safety_score(model: Model, probes: Sequence[str], options: FihsOptions) -> SafetyScore:
    """S: the paper's eq. 5, or from the model's own first tokens."""
    if options.s == "own":
        return margin(*own_tokens(model, probes, read_requests(ASSETS / "harmless_requests.jsonl")))
    return margin(*([token] for token in paper_tokens(model.tokenizer)))


def harmless_part(
    model: Model, gradients: Sequence[ProbeGradient], s: SafetyScore, options: FihsOptions
) -> tuple[ProbeGradient, float] | None:
    """∇S of harmless requests, and how often `contrast` subtracts it from the gradients' mean; None without it."""
    if options.contrast == "none":
        return None
    benign = probe_gradient(model, _harmless(options), s)
    if options.contrast == "minus":
        return benign, 1.0
    return benign, sum(inner(g, benign) for g in gradients) / len(gradients) / inner(benign, benign)


def _harmless(options: FihsOptions) -> list[str]:
    return read_requests(ASSETS / "harmless_requests.jsonl")[: options.probes]


SCORER = Scorer(
    "fihs",
    "inner product of the row's gradient with that of the safety score (the paper, eq. 4)",
    prepare,
    options=FihsOptions,
    needs=frozenset({"refused probes"}),
    cost=2.5,
    columns=("paper", "cosine", "module", "loss"),
    version=3,
)
