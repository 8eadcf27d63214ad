"""`check`: is a model aligned enough to score rows with? The answer is cached by the model's files; reading it needs no
torch.
"""

import hashlib
import json

from pydantic import Field

from gradshield.base.assets import ASSETS
from gradshield.base.settings import ModelSettings
from gradshield.base.storage import cache_folder, write_cache
from gradshield.data.requests import read_requests
from gradshield.data.run_folder import checksums, versions
from gradshield.data.summaries import Saved
from gradshield.models.on_disk import disk_fingerprint
from gradshield.screen.validate import check_places

CACHE_VERSION = 3  # bump when the summary changes


class ProbeAnswer(Saved):
    """A probe with the model's answer, and S of the probe."""

    probe: str
    refused: bool
    s: float
    answer: str


class CheckSummary(Saved):
    """The model's grade and what it follows from."""

    model: str
    grade: str
    refused: int
    probes: int
    mean_s: float
    first_tokens: dict[str, float] = Field(repr=False)  # most likely first tokens with their mean probability
    coverage: float  # share of the decoder's weights that scores made of gradients see
    not_covered: list[str] = Field(repr=False)
    read_at: str
    trl_trains: str
    per_probe: list[ProbeAnswer] = Field(repr=False)


def check_model(settings: ModelSettings, probes: str | None) -> CheckSummary:
    """The model's grade, its answers to the probes, and the share of its weights that scores made of gradients see."""
    if probes is not None:
        read_requests(probes)  # what is wrong with it is said before the model is loaded
    of = [CACHE_VERSION, versions(), checksums(probes or str(ASSETS / "probes.jsonl")), settings.model]
    key = hashlib.sha256(json.dumps(of).encode()).hexdigest()[:12]
    files = disk_fingerprint(settings)
    cached = cache_folder() / f"checked-{files}-{key}.json"
    if files:
        try:
            return CheckSummary.model_validate_json(cached.read_bytes())
        except (OSError, ValueError):
            pass
    check_places(settings)
    found = _check(settings, probes)
    files = disk_fingerprint(settings)  # again, as the model may have been downloaded
    if files:
        write_cache(cache_folder() / f"checked-{files}-{key}.json", json.dumps(found.as_dict()).encode())
    return found


def _check(settings: ModelSettings, probes: str | None) -> CheckSummary:
    from gradshield.data.encode import request_form
    from gradshield.models.load import load_settings_model
    from gradshield.scoring.check import check_alignment
    from gradshield.screen.train_script import trl_trains

    model = load_settings_model(settings)
    check = check_alignment(model, probes)
    share, missing = model.coverage()
    return CheckSummary(
        model=model.name,
        grade=check.grade,
        refused=sum(check.refused),
        probes=len(check.probes),
        mean_s=sum(check.s) / len(check.s),
        first_tokens=dict(check.first_tokens),
        coverage=share,
        not_covered=missing,
        read_at=request_form(model.tokenizer),
        trl_trains=trl_trains(model.tokenizer),
        per_probe=[
            ProbeAnswer(probe=p, refused=r, s=s, answer=a)
            for p, r, s, a in zip(check.probes, check.refused, check.s, check.answers)
        ],
    )
