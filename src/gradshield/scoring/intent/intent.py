"""`intent`, the default score, as a registered scorer: fitted once per model, then read."""

from collections.abc import Mapping

import numpy as np

from gradshield.base.assets import ASSETS
from gradshield.base.registry import NoOptions
from gradshield.data.requests import read_requests
from gradshield.scoring.anchors import ANCHOR_FILES, anchor_examples
from gradshield.scoring.base import Context, Prepared, Scorer
from gradshield.scoring.intent.fit import fit_intent
from gradshield.scoring.intent.late import late_anchors, long_refusals
from gradshield.scoring.intent.readouts import Intent, Readout, intent_scores, seen

REFUSED_FILES = ("align_harmful.jsonl", "requests_harmful.jsonl")
HARMLESS_FILES = (
    "harmless_requests.jsonl",
    "align_benign.jsonl",
    "align_imperative.jsonl",
    "requests_harmless.jsonl",
)


def prepare(context: Context, options: NoOptions) -> Prepared:
    """Fits the two readouts on the bundled anchors and requests; cached per model."""
    model = context.model
    saved = context.cached("fit", lambda: _fit(context))
    intent = Intent(
        tuple(saved["layers"].tolist()),
        tuple(saved["closing"].tolist()),
        Readout(saved["request"], float(saved["request_bias"])),
        Readout(saved["answer"], float(saved["answer_bias"])),
    )
    return Prepared(
        lambda batch: intent_scores(model, intent, batch),
        {kind: saved[f"anchors_{kind}"] for kind in ANCHOR_FILES},
        lambda rows: seen(model, rows),
    )


def _fit(context: Context) -> Mapping[str, np.ndarray]:
    model = context.model
    to_refuse = [*context.probes, *(r for file in REFUSED_FILES for r in read_requests(ASSETS / file))]
    harmless = [r for file in HARMLESS_FILES for r in read_requests(ASSETS / file)]
    rows = anchor_examples(model)
    rows["refusal"] += long_refusals(model)
    late = late_anchors(model, rows["harmful"])
    intent, anchors = fit_intent(model, rows, late, to_refuse, harmless, context.batch_tokens)
    return {
        "layers": np.array(intent.layers),
        "closing": np.array(intent.closing, dtype=np.int64),
        "request": intent.request.weight,
        "request_bias": np.array(intent.request.bias),
        "answer": intent.answer.weight,
        "answer_bias": np.array(intent.answer.bias),
        **{f"anchors_{kind}": values for kind, values in anchors.items()},
    }


SCORER = Scorer(
    "intent",
    "does the row answer what the model would refuse? Two linear readouts of hidden states",
    prepare,
    needs=frozenset({"refused probes", "request"}),
    cost=0.8,
    columns=("request", "answer"),
    version=7,
)
