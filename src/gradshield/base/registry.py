"""Registries: scorers and defenses are found by name and have their own options, NAME[:key=value,…]."""

from collections.abc import Collection, Mapping
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, Generic, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from gradshield.base.errors import UserError
from gradshield.base.settings import complaint


class NoOptions(BaseModel):
    """Base of a scorer's or a defense's options. An unknown option is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Named(Protocol):
    """An entry of a registry."""

    @property
    def name(self) -> str: ...
    @property
    def options(self) -> type[BaseModel]: ...


T = TypeVar("T", bound=Named)
Options = TypeVar("Options", bound=BaseModel)


class Registry(Generic[T]):
    """All entries of one kind. Each is imported on first use."""

    def __init__(
        self, kind: str, constant: str, homes: Mapping[str, str], package: str, skip: Collection[str] = ()
    ) -> None:
        """`homes` are modules by name; so is each module of `package` but for those to `skip`, with - for _. A module
        exports its thing as `constant`."""
        self.kind, self.constant, self.package, self.skip = kind, constant, package, skip
        self.homes, self.registered = dict(homes), dict[str, T]()

    def register(self, thing: T) -> None:
        """Registers an entry under its name. Raises ValueError if the name is taken."""
        if thing.name in self.names():
            raise ValueError(f"a {self.kind} named {thing.name!r} exists already")
        self.registered[thing.name] = thing

    def names(self) -> list[str]:
        """Every name, the default first."""
        return [*self._modules(), *self.registered]

    def find(self, text: str) -> tuple[T, Any]:
        """The thing and its options for NAME[:key=value,…]. Raises UserError naming what is wrong."""
        name, given = self.parsed(text)
        if name in self.registered:
            thing = self.registered[name]
        else:
            thing = getattr(import_module(self._modules()[name]), self.constant)
        return thing, make_options(thing.options, given, f"--{self.kind} {name}")

    def check(self, text: str) -> None:
        """Raises UserError for an unknown name or a wrong option. Only options need the import, which is slow."""
        _, given = self.parsed(text)
        if given:
            self.find(text)

    def parsed(self, text: str) -> tuple[str, dict[str, str]]:
        """(name, options) of NAME[:key=value,…], without importing the thing. Raises UserError for an unknown name."""
        name, given = parse_spec(text)
        if name not in self.names():
            known = ", ".join(self.names())
            raise UserError(f"--{self.kind} {name}: no such {self.kind}; there are {known} (gradshield {self.kind}s)")
        return name, given

    def _modules(self) -> dict[str, str]:
        found = [m.name for m in iter_modules(import_module(self.package).__path__) if m.name not in self.skip]
        return self.homes | {name.replace("_", "-"): f"{self.package}.{name}" for name in found}


def parse_spec(text: str) -> tuple[str, dict[str, str]]:
    """(name, options) of NAME[:key=value,…]. Raises UserError for a part without "="."""
    name, _, rest = text.partition(":")
    given = {}
    for part in filter(None, (p.strip() for p in rest.split(","))):
        key, found, value = part.partition("=")
        if not found:
            raise UserError(f"{text}: {part!r} is not key=value")
        given[key.strip()] = value.strip()
    return name.strip(), given


def make_options(options: type[Options], given: Mapping[str, str], where: str) -> Options:
    """The options with the given values. Raises UserError naming the first wrong one."""
    try:
        return options.model_validate_strings(dict(given))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = ", ".join(options.model_fields) or "none"
            raise UserError(f"{where}: no option {key!r}; it has {known}") from None
        raise UserError(f"{where}: {key}={given.get(key)}: {complaint(error)}") from None
