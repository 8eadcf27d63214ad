"""What is known of each row in a few bytes: the group it is of, and its place in the files."""

from array import array
from collections.abc import Sequence
from typing import overload

from gradshield.data.rows import Row

MAX_GROUPS = 10_000  # names; a row of any further group is listed under its file


class Groups(Sequence[str]):
    """The group of each row, each name kept once."""

    def __init__(self) -> None:
        self._codes, self._names = array("i"), list[str]()
        self._code_of: dict[str, int] = {}

    def append(self, name: str, file: str) -> None:
        """Adds a row of the group `name`, or of the group `file` where there are too many."""
        if name not in self._code_of:
            name = name if len(self._names) < MAX_GROUPS else file
        code = self._code_of.setdefault(name, len(self._names))
        if code == len(self._names):
            self._names.append(name)
        self._codes.append(code)

    def __len__(self) -> int:
        return len(self._codes)

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> list[str]: ...
    def __getitem__(self, at: int | slice) -> str | list[str]:
        if isinstance(at, slice):
            return [self._names[code] for code in self._codes[at]]
        return self._names[self._codes[at]]


class Places(Sequence[str]):
    """The place of each row, `file:line`."""

    def __init__(self, files: Sequence[str]) -> None:
        self._files, self._number = files, {name: n for n, name in enumerate(files)}
        self._file, self._line = array("i"), array("q")

    def append(self, row: Row) -> None:
        self._file.append(self._number[row.source])
        self._line.append(row.line)

    def __len__(self) -> int:
        return len(self._line)

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> list[str]: ...
    def __getitem__(self, at: int | slice) -> str | list[str]:
        if isinstance(at, slice):
            return [self[n] for n in range(len(self))[at]]
        return f"{self._files[self._file[at]]}:{self._line[at]}"
