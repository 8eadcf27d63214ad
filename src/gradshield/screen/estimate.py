"""Estimates what `filter` would do, and how long it would take."""

import time
from dataclasses import dataclass

from gradshield.base.settings import FilterSettings
from gradshield.data import Source, open_source
from gradshield.data.examples import token_counts
from gradshield.models.load import load_settings_model
from gradshield.scoring.check import require_aligned
from gradshield.scoring.engine import score
from gradshield.scoring.reference import make_reference
from gradshield.screen.encoding import encode_source, find_layout, known_good
from gradshield.screen.train_script import trl_trains
from gradshield.screen.validate import find_checked


@dataclass(frozen=True)
class Estimate:
    """What a run of filter would do."""

    file: str
    format: str
    layout: str
    trl_trains: str
    rows: int
    to_score: int
    set_aside: int
    tokens: int
    seconds: float


def estimate(path: str | Source, settings: FilterSettings) -> Estimate:
    """What `run_filter` would do and how long it would take, measured on a few of the rows; writes nothing."""
    needs = find_checked(settings)[0].needs
    source = path if isinstance(path, Source) else open_source(path, settings.format, settings.split)
    layout = find_layout(source, settings)
    model = load_settings_model(settings)
    check = require_aligned(model, settings)
    encoded = encode_source(source, layout, model, settings, needs)
    own_safe = known_good(model, settings, needs)
    reference = make_reference(model, check, settings, encoded.examples, own_safe=own_safe)
    step = max(1, len(encoded.examples) // 16)
    sample = encoded.examples[::step][:16]
    start = time.monotonic()
    score(reference.scored_part(sample), reference.scorer, batch_tokens=model.batch_tokens, title="timing a sample")
    pace = (time.monotonic() - start) / sum(len(e.ids) for e in sample)
    tokens = int(token_counts(encoded.examples).sum())
    forms = () if settings.columns else (f for n, f in enumerate(encoded.forms) if n not in encoded.reasons)
    return Estimate(
        file=source.path,
        format=source.format,
        layout=layout,
        trl_trains=trl_trains(model.tokenizer, layout, forms),
        rows=encoded.rows,
        to_score=len(encoded.examples),
        set_aside=len(encoded.reasons),
        tokens=tokens,
        seconds=round(pace * tokens, 2),
    )
