"""The tokens with the largest shares in the highest rows, for the report."""

import logging

import numpy as np

from gradshield.base.progress import progress
from gradshield.base.settings import FilterSettings
from gradshield.data.examples import row_numbers
from gradshield.models.load import Model
from gradshield.report.filter_report import highest_rows
from gradshield.scoring.check import AlignmentCheck
from gradshield.scoring.fihs.fihs import fihs_options, harmless_part, safety_score
from gradshield.scoring.fihs.parts import Shares, fihs_parts, shares, words
from gradshield.scoring.fihs.probe import minus, probe_gradient
from gradshield.screen.encoding import Encoded

COST = 3  # forward passes of their tokens that the rows take
EXPLAINED_BY = 4  # probes whose gradient colours the tokens in the report


def explain_highest(
    model: Model, check: AlignmentCheck, settings: FilterSettings, encoded: Encoded, scores: np.ndarray
) -> dict[int, Shares]:
    """Response tokens with their shares of FIHS, by row, for as many of the highest rows as one batch holds.

    The verdicts don't depend on it: where memory or gradients are not available, the tokens stay unmarked.
    """
    at = np.searchsorted(row_numbers(encoded.examples), highest_rows(scores))
    chosen = [encoded.examples[int(n)] for n in at]
    room = np.cumsum([len(e.ids) for e in chosen])
    chosen = chosen[: max(1, int((room <= model.batch_tokens).sum()))]
    found: dict[int, Shares] = {}
    try:
        probes = check.refused_probes()
        options = fihs_options(settings.scorer)
        s = safety_score(model, probes, options)
        gradient = probe_gradient(model, probes[:EXPLAINED_BY], s)
        harmless = harmless_part(model, [gradient], s, options)
        gradient = minus(gradient, *harmless) if harmless else gradient
        with progress("explaining the highest rows", int(room[len(chosen) - 1]), len(chosen)) as advance:
            for e in chosen:
                parts, _ = fihs_parts(model, e, [gradient])
                found[e.row] = words(model.tokenizer, e, shares(parts[0].sum(0)), responses_only=True)
                advance(len(e.ids), 1)
    except Exception as error:  # whatever a model's own code raises: nothing else is to be lost by it
        why = (str(error).strip() or type(error).__name__).split("\n")[0]
        logging.getLogger("gradshield").warning("tokens are not marked in the report: %s", why)
    return found
