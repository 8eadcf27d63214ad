"""`check`: is a model aligned enough to be the reference? Cached by its files; a cached answer needs no torch."""

import hashlib
import json
from typing import Any

from gradshield.base.assets import ASSETS
from gradshield.base.settings import ModelSettings
from gradshield.base.storage import cache_folder, write_cache
from gradshield.data.run_folder import checksums, versions
from gradshield.models.on_disk import disk_fingerprint
from gradshield.screen.early import check_places

CACHE_VERSION = 2  # bump when the facts change


def check_model(settings: ModelSettings, probes: str | None) -> dict[str, Any]:
    """The model's grade, its answers to the probes, and the share of its weights that scores made of gradients see."""
    of = [CACHE_VERSION, versions(), checksums(probes or str(ASSETS / "probes.jsonl")), settings.model]
    key = hashlib.sha256(json.dumps(of).encode()).hexdigest()[:12]
    files = disk_fingerprint(settings)
    cached = cache_folder() / f"checked-{files}-{key}.json"
    if files:
        try:
            return dict(json.loads(cached.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            pass
    check_places(settings)
    facts = _facts(settings, probes)
    files = disk_fingerprint(settings)  # again, as the model may have been downloaded
    if files:
        write_cache(cache_folder() / f"checked-{files}-{key}.json", json.dumps(facts).encode())
    return facts


def _facts(settings: ModelSettings, probes: str | None) -> dict[str, Any]:
    from gradshield.data.encode import request_form
    from gradshield.scoring.check import check_alignment
    from gradshield.screen.filter import load
    from gradshield.screen.train_script import trl_trains

    model = load(settings)
    check = check_alignment(model, probes)
    share, missing = model.coverage()
    return {
        "model": model.name,
        "grade": check.grade,
        "refused": sum(check.refused),
        "probes": len(check.probes),
        "mean_s": sum(check.s) / len(check.s),
        "first_tokens": dict(check.first_tokens),
        "coverage": share,
        "not_covered": missing,
        "read_at": request_form(model.tokenizer),
        "trl_trains": trl_trains(model.tokenizer),
        "per_probe": [
            {"probe": p, "refused": r, "s": s, "answer": a}
            for p, r, s, a in zip(check.probes, check.refused, check.s, check.answers)
        ],
    }
