"""One training under a defense, and the model that it leaves."""

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from gradshield.base.settings import FilterSettings, FinetuneSettings
from gradshield.data.encode import Example
from gradshield.defenses.base import DefenseContext, check_defense
from gradshield.defenses.registry import find_defense
from gradshield.models.load import Model
from gradshield.training.finetune import finetune

PROMPT = "prompt.json"


def defended_rows(
    model: Model, rows: Sequence[Example], training: FinetuneSettings, settings: FilterSettings, name: str
) -> Sequence[Example]:
    """The rows that the defense `name` trains on, which is one that needs no screening. Raises UserError where it can't
    work with the model or the settings."""
    defense, options = find_defense(name)
    context = DefenseContext(model, settings, training)
    check_defense(defense, context, options)
    return defense.rows(context, options, rows)


def train_defended(
    model: Model,
    examples: Sequence[Example],
    out: Path,
    training: FinetuneSettings,
    settings: FilterSettings,
    name: str,
) -> dict[str, float]:
    """`finetune` with the hooks of the defense `name`; its system prompt, if it has one, is kept beside the weights.

    Where a launcher started several processes, all of them call this.
    """
    defense, options = find_defense(name)
    context = DefenseContext(model, settings, training, examples=examples)
    figures = finetune(model, examples, out, training, defense.hooks(context, options))
    if prompt := defense.prompt(context, options):
        (out / PROMPT).write_text(json.dumps({"system": prompt}), encoding="utf-8")
    return figures


def with_prompt(model: Model, folder: Path) -> Model:
    """The model with the system prompt kept in the folder in front of every conversation; the model itself without."""
    file = folder / PROMPT
    if not file.is_file():
        return model
    said = json.dumps(json.loads(file.read_text(encoding="utf-8"))["system"])
    tokenizer = copy.deepcopy(model.tokenizer)
    first = "messages and messages[0]['role'] == 'system'"
    with_first_turn = f"[{{'role': 'system', 'content': {said} + ' ' + messages[0]['content']}}] + messages[1:]"
    as_first_turn = f"[{{'role': 'system', 'content': {said}}}] + messages"
    start = f"{{%- if {first} %}}{{%- set messages = {with_first_turn} %}}"
    changed = start + f"{{%- else %}}{{%- set messages = {as_first_turn} %}}{{%- endif %}}"
    tokenizer.chat_template = changed + tokenizer.get_chat_template()
    return replace(model, tokenizer=tokenizer)
