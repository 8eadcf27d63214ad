"""The Scorer contract: a score's name, its needs and cost, and how it is prepared for a model.

One file a scorer, which exports `SCORER`; `registry` finds it by name. docs/architecture.md adds one in thirty lines.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from pydantic import BaseModel

from gradshield.base.errors import UserError
from gradshield.base.registry import NoOptions
from gradshield.data.encode import Example
from gradshield.scoring.anchors import anchor_examples
from gradshield.scoring.cache import cache_file, cached_arrays, parts_of

if TYPE_CHECKING:
    from gradshield.models.load import Model  # imports torch

Need = Literal["refused probes", "request", "text", "anchors", "safe rows", "whole file", "endpoint"]
"""`request`: rows have a request apart from the response. `text`: `Example.conversation` is set. `endpoint`: rows leave
this machine. The others are what `Context` gives."""


@dataclass(frozen=True)
class Scores:
    """One number per example under each column's name. The column "score" sets the verdict (high = harmful)."""

    columns: Mapping[str, np.ndarray]  # float64 [examples]
    reasons: Mapping[int, str] = field(default_factory=dict)  # why an example (by index) can't be scored

    def __getitem__(self, column: str) -> np.ndarray:
        return self.columns[column]


ScoreFunction = Callable[[Sequence[Example]], Scores | Mapping[str, np.ndarray]]
"""Examples → their scores; a plain mapping of columns sets no row aside."""


@dataclass(frozen=True)
class Prepared:
    """A scorer that is ready to score rows with one model."""

    score: ScoreFunction
    anchors: Mapping[str, np.ndarray] | None = None
    """Out-of-fold scores of the anchors by kind, where the scorer was fitted on them. None: they are scored as rows."""
    read: Callable[[Sequence[Example]], list[Example]] = list  # the part of examples that the scorer reads
    fitted: bool = False  # on `Context.fit_anchors`: only the anchors that are not among them set the threshold


@dataclass(frozen=True)
class Scorer:
    """A scorer of rows. Its scores depend only on the model, the options and the inputs in `needs`."""

    name: str
    summary: str  # one line
    prepare: Callable[["Context", Any], Prepared]
    options: type[BaseModel] = NoOptions
    needs: frozenset[Need] = frozenset()
    cost: float = 1.0  # forward passes a row, roughly
    columns: tuple[str, ...] = ()  # the signals it keeps beside "score"
    unit: str = ""  # of the score, where it has one, such as "log-odds"; charts show it
    version: int = 1  # bump when scores change; invalidates caches

    def __post_init__(self) -> None:
        if unknown := self.needs - set(get_args(Need)):
            raise ValueError(f"scorer {self.name}: unknown needs {sorted(unknown)}")


@dataclass(frozen=True)
class Context:
    """The inputs that a scorer may use while it is prepared. It must declare them in `needs`."""

    scorer: Scorer
    options: BaseModel
    model: "Model"
    probes: tuple[str, ...]  # harmful requests that the model refuses
    loss_on: str = "assistant"
    max_length: int = 1024
    batch_tokens: int = 2048
    rows: Sequence[Example] | None = None  # of the file; None on a worker, which has what was fitted
    rows_key: str = ""  # digest of these rows
    own_safe: Sequence[Example] = ()  # the user's known-good rows
    own_safe_key: str = ""
    used: set[Path] = field(default_factory=set)  # cache files that were read or written: a worker needs them

    @cached_property
    def anchors(self) -> Mapping[str, list[Example]]:
        """The bundled rows of known verdict by kind ("good", "refusal", "harmful"), encoded like the file's."""
        return anchor_examples(self.model, self.loss_on, self.max_length)

    @property
    def fit_anchors(self) -> Mapping[str, list[Example]]:
        """Every second anchor of each kind, for a scorer that is fitted on anchors and sets `Prepared.fitted`."""
        self._declared("anchors")
        return {kind: examples[::2] for kind, examples in self.anchors.items()}

    @cached_property
    def safe_rows(self) -> list[Example]:
        """Rows that are safe to train on: the good and refusing anchors, and the user's own (--reference)."""
        self._declared("safe rows")
        return [*self.anchors["good"], *self.anchors["refusal"], *self.own_safe]

    @property
    def examples(self) -> Sequence[Example]:
        """Every row of the file. Use it only inside the `make` of `cached`: workers do not have it."""
        self._declared("whole file")
        if self.rows is None:
            raise UserError(
                f"{self.scorer.name}: the state fitted on this file is no longer in the cache; filter the file again"
            )
        return self.rows

    def cached(self, name: str, make: Callable[[], Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """The result of `make()`, or its earlier result for the same model, options and needs. It survives a restart
        and is sent to the workers.
        """
        what, of = self._key(name)
        file, found = cached_arrays(what, self.model, of, make)
        self.used.add(file)
        return found

    def parts_folder(self, name: str) -> Path:
        """A folder in which the `make` of `cached(name, make)` may save finished parts, so that it can resume after an
        interruption. It is removed once the whole result is cached.
        """
        what, of = self._key(name)
        return parts_of(cache_file(what, self.model, of, "safetensors"))

    def _key(self, name: str) -> tuple[str, list[object]]:
        """The name in the cache, and what the content follows from beside the model and the bundled texts."""
        needs = self.scorer.needs
        of: list[object] = [self.scorer.version, self.options.model_dump(mode="json")]
        if "refused probes" in needs:
            of.append(self.probes)
        if needs & {"anchors", "safe rows", "whole file"} or name == "anchors":
            of += [self.loss_on, self.max_length]
        if "safe rows" in needs:
            of.append(self.own_safe_key)
        if "whole file" in needs:
            of.append(self.rows_key)
        return f"{self.scorer.name}-{name}", of

    def _declared(self, need: Need) -> None:
        if need not in self.scorer.needs:
            raise TypeError(f"scorer {self.scorer.name} uses {need!r} without declaring it in its needs")
