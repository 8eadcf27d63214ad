"""The model under a defense that changes the alignment: aligned once with our recipe, and cached."""

import hashlib
import json
from collections.abc import Sequence

from gradshield.base.assets import ASSETS
from gradshield.base.errors import UserError
from gradshield.base.processes import processes
from gradshield.base.settings import FilterSettings
from gradshield.base.storage import cache_folder
from gradshield.data.encode import Example
from gradshield.defenses.base import Defense, DefenseContext
from gradshield.defenses.registry import find_defense
from gradshield.models.load import Model
from gradshield.models.on_disk import EMBEDDED, EMBEDDED_BASE, disk_fingerprint
from gradshield.training.align import SETTINGS, align_once
from gradshield.training.interventions import Hooks

VERSION = 1  # bump when the same defense and options would align in another way
BUNDLED = ("align_harmful", "align_benign", "align_imperative", "anchors_harmful")


def check_aligned(defense: Defense, settings: FilterSettings) -> None:
    """Raises UserError where the defense changes the alignment of a model whose alignment is not our own."""
    if "alignment recipe" not in defense.needs:
        return
    if settings.model not in (EMBEDDED, EMBEDDED_BASE) or settings.adapter or settings.quantize:
        raise UserError(
            f"--defense {defense.name} changes how a model is aligned, which works only with the embedded "
            "model: use --model embedded, without --adapter or --quantize"
        )
    if processes() > 1:
        raise UserError(f"--defense {defense.name} aligns the model first: start it without a launcher")


def aligned_settings(settings: FilterSettings, name: str) -> FilterSettings:
    """The settings with the model that the defense aligns, which is trained where the cache does not have it; the
    settings themselves where the defense leaves the alignment as it is."""
    defense, options = find_defense(name)
    if "alignment recipe" not in defense.needs:
        return settings
    texts = [hashlib.sha256((ASSETS / f"{file}.jsonl").read_bytes()).hexdigest() for file in BUNDLED]
    recipe = FilterSettings(model=EMBEDDED_BASE)  # the user's settings of rows don't change the alignment
    parts = [options.model_dump(mode="json"), SETTINGS.model_dump(mode="json"), disk_fingerprint(recipe)]
    key = hashlib.sha256(json.dumps([VERSION, texts, *parts]).encode()).hexdigest()[:12]
    folder = cache_folder() / f"aligned-{defense.name}-{key}"

    def change(model: Model, examples: list[Example]) -> tuple[Sequence[Example], Hooks]:
        context = DefenseContext(model, recipe, SETTINGS)
        rows = defense.align_rows(context, options, examples)
        context = DefenseContext(model, recipe, SETTINGS, examples=rows)
        return rows, defense.align_hooks(context, options)

    align_once(EMBEDDED_BASE, folder, change, settings.device)
    return settings.model_copy(update={"model": EMBEDDED_BASE, "adapter": str(folder)})
