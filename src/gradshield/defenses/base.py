"""The Defense contract: what a defense is called, needs and costs, and where it reaches into a fine-tuning.

docs/architecture.md adds one in thirty lines.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
from pydantic import BaseModel

from gradshield.base.errors import UserError
from gradshield.base.registry import NoOptions
from gradshield.base.settings import FilterSettings, FinetuneSettings
from gradshield.data.encode import Example, encode
from gradshield.data.formats import Conversation
from gradshield.defenses.registry import SafeRows
from gradshield.models.load import Model
from gradshield.scoring.anchors import anchor_examples
from gradshield.screen.encoding import known_good
from gradshield.threshold import Threshold
from gradshield.training.interventions import Hooks

Need = Literal[
    "screening", "search", "adapter", "safe rows", "harmful rows", "base model", "alignment recipe", "secret prompt"
]
"""`screening`: every row is scored first, and `DefenseContext.screen` has the scores. `search`: if the model is not
safe, tune trains again on fewer rows (alg. 1). `adapter`: it changes a trained LoRA adapter, so `--method full` is
refused. `alignment recipe`: it aligns the model in another way, so only the embedded model can be used, whose alignment
is our own. The others tell the user what a defense asks for: rows, bundled or their own; the model before its
alignment, whose weights it compares; and a system prompt at inference."""


@dataclass(frozen=True)
class DefenseContext:
    """The inputs that a defense may use."""

    model: Model
    settings: FilterSettings
    training: FinetuneSettings
    screen: tuple[np.ndarray, Threshold] | None = None  # score of each row of the file (NaN: none), and the threshold
    examples: Sequence[Example] = ()  # the rows trained on; none yet in `Defense.rows`

    @cached_property
    def anchors(self) -> dict[str, list[Example]]:
        """Bundled rows of known verdict by kind: "good", "refusal" (safe to train on), "harmful"."""
        found = anchor_examples(self.model, self.settings.loss_on, self.settings.max_length)
        return {kind: [replace(e, row=-1) for e in examples] for kind, examples in found.items()}

    def safe_rows(self, options: SafeRows) -> list[Example]:
        """Refused requests, `options.count` of them at even distances, with their conversations. Raises UserError where
        there are fewer."""
        if options.safe is None:
            found, source = self.anchors["refusal"], "the bundled set"
        else:
            own = self.settings.model_copy(update={"reference": options.safe})
            found, source = known_good(self.model, own, {"text", "request"}), options.safe
        if len(found) < options.count:
            raise UserError(f"{source}: {len(found)} usable safe rows, not {options.count}: lower count, or add rows")
        places = np.linspace(0, len(found), options.count, endpoint=False).astype(int)
        return [replace(found[n], row=-1) for n in places]

    def encode(self, conversation: Conversation) -> Example | str:
        """The encoded row that the defense adds, or why this model's chat template can't encode it."""
        limits = {"max_length": self.settings.max_length, "loss_on": self.settings.loss_on}
        return encode(conversation, -1, self.model.tokenizer, **limits)


def no_hooks(context: DefenseContext, options: Any) -> Hooks:
    """Leaves the training unchanged."""
    return Hooks()


def keep_all_rows(context: DefenseContext, options: Any, rows: Sequence[Example]) -> Sequence[Example]:
    """Returns the rows unchanged."""
    return rows


def no_check(context: DefenseContext, options: Any) -> None:
    """Accepts every model and all settings."""


def no_prompt(context: DefenseContext, options: Any) -> str:
    """Adds no system prompt at inference."""
    return ""


@dataclass(frozen=True)
class Defense:
    """A defense. Hooks that it does not set do nothing."""

    name: str
    summary: str  # one line
    options: type[BaseModel] = NoOptions
    needs: frozenset[Need] = frozenset()
    cost: float = 1.0  # trainings, roughly, without scoring
    rows: Callable[[DefenseContext, Any, Sequence[Example]], Sequence[Example]] = keep_all_rows
    """Rows that can be trained on → rows to train on. Those left out are quarantined; those added have row −1."""
    hooks: Callable[[DefenseContext, Any], Hooks] = no_hooks
    prompt: Callable[[DefenseContext, Any], str] = no_prompt
    """A system prompt that the trained model is used with: it goes in front of the user's own, with a space between."""
    align_rows: Callable[[DefenseContext, Any, Sequence[Example]], Sequence[Example]] = keep_all_rows
    """Rows of the alignment's own training → rows to align with. Its context has the model before the alignment."""
    align_hooks: Callable[[DefenseContext, Any], Hooks] = no_hooks
    """Hooks of the alignment's own training. It happens once for all trainings with the same options."""
    check: Callable[[DefenseContext, Any], None] = no_check
    """Raises UserError for a model or settings that it can't work with, before anything is measured or trained."""

    def __post_init__(self) -> None:
        if unknown := self.needs - set(get_args(Need)):
            raise ValueError(f"defense {self.name}: unknown needs {sorted(unknown)}")


def check_defense(defense: Defense, context: DefenseContext, options: Any) -> None:
    """Raises UserError for a model or settings that the defense does not support."""
    if "adapter" in defense.needs and context.training.method != "lora":
        raise UserError(f"--defense {defense.name} changes a LoRA adapter: use it with --method lora")
    if "base model" in defense.needs and context.settings.quantize:
        raise UserError(f"--defense {defense.name} compares unquantised weights: leave out --quantize")
    if isinstance(options, SafeRows):
        context.safe_rows(options)
    defense.check(context, options)
