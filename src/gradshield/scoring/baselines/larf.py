"""`larf`: cosine to harmful answers minus cosine to refusals, at the layer that refusing depends on most.

Source: Li et al., Layer-Aware Representation Filtering: Purifying Finetuning Data to Preserve LLM Safety Alignment
(2507.18631), and their code.

    score(z) = mean_u cos(h(z), h(u)) − mean_s cos(h(z), h(s))

h is the state of the safety-sensitive layer at the last token, u the harmful examples and s the same number of refusals
(the paper: a hundred each; here bundled anchors). The paper finds the layer by scaling each layer's weights and
counting refusals of over-refusal prompts. It leaves open how strongly; here a block's contribution is scaled by 1 ±
`alpha`. The layer is the one whose scaling moves S (eq. 5) most over scary but harmless requests. S replaces the count,
since it needs one forward pass a layer and no generation.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from pydantic import Field
from torch import Tensor, nn

from gradshield.base.assets import ASSETS
from gradshield.base.registry import NoOptions
from gradshield.data.encode import Example
from gradshield.data.requests import read_requests
from gradshield.models.load import Model
from gradshield.scoring.base import Context, Prepared, Scorer
from gradshield.scoring.fihs.probe import first_logits, margin, paper_tokens
from gradshield.scoring.states import cosine, layer_of, read_states, states_at

EXAMPLES = 100  # of each kind


class LarfOptions(NoOptions):
    """Where states are read."""

    layer: int | None = Field(default=None, ge=0, description="decoder block to read (default: the most sensitive one)")
    alpha: float = Field(
        default=0.2, gt=0, lt=1, description="relative change of a block's contribution in the search for the layer"
    )


def prepare(context: Context, options: LarfOptions) -> Prepared:
    """Finds the layer and reads the examples there."""
    model, anchors = context.model, context.fit_anchors

    def fit() -> dict[str, np.ndarray]:
        layer = layer_of(model, options.layer) if options.layer is not None else sensitive_layer(model, options.alpha)
        unsafe, safe = (
            read_states(model, anchors[kind][:EXAMPLES], [layer], "last", context.batch_tokens)[0]
            for kind in ("harmful", "refusal")
        )
        return {"layer": np.array(layer), "unsafe": unsafe, "safe": safe}

    fitted = context.cached("examples", fit)
    layer = int(fitted["layer"].item())

    def score(batch: Sequence[Example]) -> Mapping[str, np.ndarray]:
        state = states_at(model, batch, [layer], "last")[0].numpy()
        return {"score": cosine(state, fitted["unsafe"]).mean(1) - cosine(state, fitted["safe"]).mean(1)}

    return Prepared(score, fitted=True)


def sensitive_layer(model: Model, alpha: float) -> int:
    """The block whose scaling up and down changes the mean S of scary but harmless requests most."""
    requests = read_requests(ASSETS / "scary_requests.jsonl")
    s = margin(*([token] for token in paper_tokens(model.tokenizer)))

    def mean_s(block: nn.Module, factor: float) -> float:
        def scale(_module: nn.Module, args: tuple, kwargs: dict, output):
            before = args[0] if args else kwargs["hidden_states"]
            whole: Tensor = output[0] if isinstance(output, tuple) else output
            scaled = before + factor * (whole - before)
            return (scaled, *output[1:]) if isinstance(output, tuple) else scaled

        handle = block.register_forward_hook(scale, with_kwargs=True)
        try:
            return float(s(first_logits(model, requests)).mean())
        finally:
            handle.remove()

    moved = [abs(mean_s(block, 1 + alpha) - mean_s(block, 1 - alpha)) for block in model.layers]
    return int(np.argmax(moved))


SCORER = Scorer(
    "larf",
    "closer to harmful answers than to refusals, at the safety-sensitive layer (2507.18631)",
    prepare,
    options=LarfOptions,
    needs=frozenset({"anchors"}),
    cost=0.8,
)
