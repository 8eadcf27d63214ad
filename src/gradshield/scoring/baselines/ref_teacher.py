"""`ref-teacher`: cosine of the prompt's state with the refusal feature.

Source: Ham et al., Refusal-Feature-guided Teacher for Safe Finetuning (2506.07356).

    R = mean of f over harmful requests − mean of f over harmless ones,  score(z) = cos(f(prompt of z), R)

f is the state of one layer at the last prompt token. The paper's teacher is first trained so that f parts the two kinds
better, and filters during its own fine-tuning recipe. This is its filter alone, on the aligned model as it is: the
baseline from which the teacher starts. The layer is left open per model; here it is the middle one. It reads requests
only, so a refusal of a harmful request scores as high as an answer to it.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from pydantic import Field

from gradshield.base.registry import NoOptions
from gradshield.data.encode import Example, encode_request
from gradshield.models.load import Model
from gradshield.scoring.base import Context, Prepared, Scorer
from gradshield.scoring.bundled_requests import harmless_requests, requests_to_refuse
from gradshield.scoring.states import cosine, layer_of, read_states, states_at


class RefTeacherOptions(NoOptions):
    """Where states are read."""

    layer: int | None = Field(default=None, ge=0, description="decoder block to read (default: the middle one)")


def prepare(context: Context, options: RefTeacherOptions) -> Prepared:
    """Takes the refusal feature from bundled requests."""
    model, layer = context.model, layer_of(context.model, options.layer)

    def fit() -> dict[str, np.ndarray]:
        kinds = (requests_to_refuse(context.probes), harmless_requests())
        harmful, harmless = (_states(model, requests, layer, context.batch_tokens).mean(0) for requests in kinds)
        return {"feature": harmful - harmless}

    feature = context.cached("feature", fit)["feature"]

    def score(batch: Sequence[Example]) -> Mapping[str, np.ndarray]:
        return {"score": cosine(states_at(model, batch, [layer], "prompt")[0].numpy(), feature[None])[:, 0]}

    return Prepared(score)


def _states(model: Model, requests: Sequence[str], layer: int, batch_tokens: int) -> np.ndarray:
    encoded = [encode_request(request, model.tokenizer) for request in requests]
    examples = [Example(n, ids, np.arange(len(ids)) > 0) for n, ids in enumerate(encoded)]
    return read_states(model, examples, [layer], "last", batch_tokens)[0]


SCORER = Scorer(
    "ref-teacher",
    "cosine of the request's state with the refusal feature (2506.07356)",
    prepare,
    options=RefTeacherOptions,
    needs=frozenset({"refused probes", "request"}),
    cost=0.5,
)
