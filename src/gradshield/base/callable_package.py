"""A package that can be called: `gradshield.screen` is a room of the house and, for users, a function."""

import inspect
import sys
from importlib import import_module
from types import ModuleType
from typing import Any


def make_callable(package: str, module: str) -> None:
    """Makes calling `package` call the function of its own name in `module`, which is imported on the first call."""

    def function() -> Any:
        return getattr(import_module(module), package.rpartition(".")[2])

    class Callable(ModuleType):
        def __call__(self, *arguments: Any, **named: Any) -> Any:
            return function()(*arguments, **named)

        def __repr__(self) -> str:
            return f"<function {package}({next(iter(self.__signature__.parameters))}, …)>"

        @property
        def __doc__(self) -> str:  # type: ignore[override]
            plain = [p.replace(annotation=inspect.Parameter.empty) for p in self.__signature__.parameters.values()]
            return f"{function().__name__}{inspect.Signature(plain)}\n\n{inspect.getdoc(function())}"

        @property
        def __signature__(self) -> inspect.Signature:  # what help and editors show
            return inspect.signature(function())

    sys.modules[package].__class__ = Callable
