"""`intent`, the default score, as a registered scorer: fitted once per model, then read."""

from collections.abc import Mapping
from dataclasses import asdict

import numpy as np

from gradshield.scoring.base import Context, NoOptions, Prepared, Scorer
from gradshield.scoring.intent.corpus import ANCHOR_ROWS, fitting_texts
from gradshield.scoring.intent.fit import fit_readouts
from gradshield.scoring.intent.kernel import Kernel
from gradshield.scoring.intent.reading import Readouts, intent_scores, scored_part

FIT_TOKENS = 2048  # of a batch, whatever the device: another size would move the readouts by its rounding
_KERNEL = "kernel_"  # before the names of the kernel's arrays in the cache


def prepare(context: Context, options: NoOptions) -> Prepared:
    """Fits the readouts on the bundled texts; cached per model."""
    model = context.model
    saved = context.cached("fit", lambda: _fit(context))
    near = {name.removeprefix(_KERNEL): each for name, each in saved.items() if name.startswith(_KERNEL)}
    kernel = Kernel(**{**near, "bias": float(near["bias"])})
    readouts = Readouts(int(saved["layer"]), saved["weight"], saved["bias"], kernel, saved["ability"])
    return Prepared(
        lambda batch: intent_scores(model, readouts, batch),
        {kind: saved[f"anchors_{kind}"] for kind in ANCHOR_ROWS},
        lambda rows: scored_part(model, rows),
    )


def _fit(context: Context) -> Mapping[str, np.ndarray]:
    texts = fitting_texts(context.model, context.probes)
    readouts, anchors = fit_readouts(context.model, texts, FIT_TOKENS, context.parts_folder("fit"))
    return {
        "layer": np.array(readouts.layer),
        "weight": readouts.weight,
        "bias": readouts.bias,
        "ability": readouts.ability,
        **{f"{_KERNEL}{name}": np.array(each) for name, each in asdict(readouts.kernel).items()},
        **{f"anchors_{kind}": values for kind, values in anchors.items()},
    }


SCORER = Scorer(
    "intent",
    "does the row answer what the model would refuse? Readouts of hidden states",
    prepare,
    needs=frozenset({"refused probes", "request"}),
    cost=0.5,
    columns=("topic", "answer"),
    unit="log-odds",
    version=16,
)
