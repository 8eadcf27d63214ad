"""Rebuilds the scorer of a run on a worker, from the settings alone."""

from gradshield.base.errors import UserError
from gradshield.base.settings import FilterSettings
from gradshield.data.rows import expanded
from gradshield.models.load import Model, load_settings_model
from gradshield.scoring.base import ScoreFunction
from gradshield.scoring.check import require_aligned
from gradshield.scoring.reference import make_reference
from gradshield.scoring.registry import find_scorer
from gradshield.screen.encoding import known_good


def build_scorer(settings: FilterSettings, fingerprint: str, rows_key: str = "") -> ScoreFunction:
    """The scorer that the settings name, made from the settings alone, as a worker needs it. Raises UserError if the
    worker's model has another fingerprint, since its scores could not be compared with the others."""
    model = load_settings_model(settings)
    if model.fingerprint != fingerprint:
        raise UserError(f"{model.name}: the worker's copy differs from the driver's (files or chat template)")
    own_safe = known_good(model, settings, find_scorer(settings.scorer)[0].needs)
    settings = settings.model_copy(update={"threshold": "fixed"})  # its anchors are not needed here
    return make_reference(model, require_aligned(model, settings), settings, None, rows_key, own_safe).scorer


def portable_settings(settings: FilterSettings, model: Model) -> FilterSettings:
    """The settings for a worker: absolute paths, no number of a GPU, and the dtype that the model has here, since a
    worker's device could choose another."""
    named = {name: getattr(settings, name) for name in ("model", "adapter", "chat_template", "probes", "reference")}
    paths = {name: expanded(value) for name, value in named.items() if value}
    found: dict[str, str | None] = {name: str(p.resolve()) for name, p in paths.items() if p.exists()}
    found["dtype"] = str(model.net.dtype).removeprefix("torch.")
    if (settings.device or "").startswith("cuda"):
        found["device"] = None  # an actor sees only its own
    return settings.model_copy(update=found)
