"""Scorers by name. A new file in `baselines/` registers itself; `register` adds one from elsewhere."""

import json
from collections.abc import Mapping
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from gradshield.base.errors import UserError
from gradshield.scoring import baselines
from gradshield.scoring.base import Scorer

_HOMES = {"intent": "gradshield.scoring.intent.intent", "fihs": "gradshield.scoring.fihs.fihs"}
_REGISTERED: dict[str, Scorer] = {}

O = TypeVar("O", bound=BaseModel)  # noqa: E741


def register(scorer: Scorer) -> None:
    """Makes a scorer available by its name. Raises ValueError where the name is taken by another."""
    if scorer.name in _homes() or _REGISTERED.get(scorer.name, scorer) != scorer:
        raise ValueError(f"a scorer named {scorer.name!r} exists already")
    _REGISTERED[scorer.name] = scorer


def names() -> list[str]:
    """Every scorer's name, the default first."""
    return [*_homes(), *_REGISTERED]


def find_scorer(text: str) -> tuple[Scorer, Any]:
    """The scorer and its options for NAME[:key=value,…]. Raises UserError naming what is wrong."""
    name, given = parse(text)
    if name in _REGISTERED:
        scorer = _REGISTERED[name]
    elif name in _homes():
        scorer = import_module(_homes()[name]).SCORER
    else:
        raise UserError(f"--scorer {name}: no such scorer; there are {', '.join(names())} (gradshield scorers)")
    return scorer, make_options(scorer.options, given, f"--scorer {name}")


def parse(text: str) -> tuple[str, dict[str, str]]:
    """(name, options) of NAME[:key=value,…]. Raises UserError for a part without "="."""
    name, _, rest = text.partition(":")
    given = {}
    for part in filter(None, (p.strip() for p in rest.split(","))):
        key, found, value = part.partition("=")
        if not found:
            raise UserError(f"{text}: {part!r} is not key=value")
        given[key.strip()] = value.strip()
    return name.strip(), given


def make_options(options: type[O], given: Mapping[str, str], where: str) -> O:
    """The options with the given values. Raises UserError naming the first that is wrong."""
    try:
        return options.model_validate_strings(json.loads(json.dumps(given)))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = ", ".join(options.model_fields) or "none"
            raise UserError(f"{where}: no option {key!r}; it has {known}") from None
        raise UserError(f"{where}: {key}={given.get(key)}: {first['msg'].lower()}") from None


def _homes() -> dict[str, str]:
    found = {m.name: f"{baselines.__name__}.{m.name}" for m in iter_modules(baselines.__path__)}
    return _HOMES | found
