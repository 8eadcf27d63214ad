"""The group and the place of each row, in a few bytes per row."""

from array import array
from collections.abc import Sequence
from typing import TypeVar, overload

from gradshield.data.rows import Row

T = TypeVar("T")
MAX_GROUPS = 10_000  # names; a row of any further group is listed under its file


class Column(Sequence[T]):
    """One value per row, computed on access."""

    def _at(self, n: int) -> T:
        raise NotImplementedError

    @overload
    def __getitem__(self, at: int) -> T: ...
    @overload
    def __getitem__(self, at: slice) -> list[T]: ...
    def __getitem__(self, at: int | slice) -> T | list[T]:
        places = range(len(self))[at]
        return self._at(places) if isinstance(places, int) else [self._at(n) for n in places]


class Groups(Column[str]):
    """The group of each row; each name is stored once."""

    def __init__(self) -> None:
        self._codes, self._names = array("i"), list[str]()
        self._code_of: dict[str, int] = {}

    def append(self, name: str, file: str) -> None:
        """Adds a row of the group `name`, or of the group `file` if there are too many groups."""
        if name not in self._code_of:
            name = name if len(self._names) < MAX_GROUPS else file
        code = self._code_of.setdefault(name, len(self._names))
        if code == len(self._names):
            self._names.append(name)
        self._codes.append(code)

    def __len__(self) -> int:
        return len(self._codes)

    def _at(self, n: int) -> str:
        return self._names[self._codes[n]]


class Places(Column[str]):
    """The place of each row, `file:line`."""

    def __init__(self, files: Sequence[str]) -> None:
        self._files, self._number = files, {name: n for n, name in enumerate(files)}
        self._file, self._line = array("i"), array("q")

    def append(self, row: Row) -> None:
        self._file.append(self._number[row.source])
        self._line.append(row.line)

    def __len__(self) -> int:
        return len(self._line)

    def _at(self, n: int) -> str:
        return f"{self._files[self._file[n]]}:{self._line[n]}"
