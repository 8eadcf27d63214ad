"""The elements of a JSON array, one at a time and byte for byte, whatever the size of the file.

A window moves over the text. It holds one record at most, so memory stays flat.
"""

import json
import re
from codecs import getincrementaldecoder
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any, BinaryIO, NamedTuple

from gradshield.base.errors import UserError
from gradshield.data.limits import MAX_RECORD, MAX_VALUES, too_large
from gradshield.data.sniff import ROW, open_bytes

_CHUNK = 1 << 16
_NEAR = 16  # characters; an error so close to the end of what was read may be due to that end
# Python's limit on the digits of an int concerns a row, not the file: numbers stay text in finding the elements.
_DECODER = json.JSONDecoder(parse_int=str)
_blank = re.compile(r"[ \t\n\r]*").match


class Frame(NamedTuple):
    """The text of a file before and after its rows."""

    head: bytes  # through the `[`
    tail: bytes  # from the `]`


class _Window:
    """The text of a stream from `mark` on; `at` is the next position to read."""

    def __init__(self, stream: BinaryIO, name: str, before: bytes = b""):
        self.stream, self.name = stream, name
        self._decode = getincrementaldecoder("utf-8")("surrogateescape").decode
        self.text, self.mark, self.at, self.ended = "", 0, 0, False
        self.line = 1 + before.count(b"\n")  # of `mark`
        self._left = len(before.rpartition(b"\n")[2].decode("utf-8", "surrogateescape"))  # of text[0] in its line

    def grow(self) -> bool:
        """Drops the text before the mark and reads on. False at the end of the file."""
        if self.ended:
            return False
        dropped = self.text[: self.mark]
        self._left = self._column(self.mark)
        self.text, self.at, self.mark = self.text[self.mark :], self.at - self.mark, 0
        del dropped
        if len(self.text) > MAX_RECORD:
            raise too_large(f"{self.name}:{self.line}", "element, or space beside it,", MAX_RECORD)
        data = self.stream.read(max(_CHUNK, len(self.text)))
        self.ended = not data
        self.text += self._decode(data, self.ended)
        return True

    def next(self, keep: bool = False) -> str:
        """The next character that is no space, "" at the end. What lies before it is dropped, unless `keep`."""
        while True:
            self.at = _blank(self.text, self.at).end()  # type: ignore[union-attr]  # it matches everywhere
            if not keep:
                self.drop()
            if self.at < len(self.text) or not self.grow():
                return self.text[self.at : self.at + 1]

    def drop(self) -> None:
        self.line += self.text.count("\n", self.mark, self.at)
        self.mark = self.at

    def take(self) -> bytes:
        """The bytes between the mark and this place, dropped from the window."""
        taken = self.text[self.mark : self.at].encode("utf-8", "surrogateescape")
        self.drop()
        return taken

    def expect(self, marks: str, keep: bool = False) -> str:
        """The next character, which must be one of `marks`; moves past it."""
        found = self.next(keep)
        if not found:
            raise self.broken("the file ends too early", self.at)
        if found not in marks:
            raise self.broken(f"expected {' or '.join(marks)}", self.at)
        self.at += 1
        return found

    def value(self) -> Any:
        """The JSON value that starts here; moves past it."""
        while True:
            length = len(self.text)
            if length - self.mark > 1 << 20 and sum(self.text.count(c, self.mark) for c in ",[{") > 2 * MAX_VALUES:
                raise UserError(f"{self.name}:{self.line}: more than {MAX_VALUES:,} values in one element; remove it")
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                cut = error.pos + _NEAR > length or error.msg.startswith("Unterminated")
                if not cut or not self.grow():
                    raise self.broken(error.msg, error.pos) from None
                continue
            except RecursionError:
                raise UserError(f"{self.name}: JSON nested too deeply; convert the file to jsonl") from None
            if end < length or not self.grow():  # a number may go on behind what was read
                self.at = end
                return value

    def broken(self, why: str, at: int) -> UserError:
        where = f"line {self.line + self.text.count(chr(10), self.mark, at)}, column {self._column(at) + 1}"
        return UserError(f"{self.name}: broken JSON at {where} ({why}); fix it there")

    def _column(self, at: int) -> int:
        newline = self.text.rfind("\n", 0, at)
        return self._left + at if newline < 0 else at - newline - 1


def read_array(path: PurePath, name: str) -> Iterator[tuple[int, bytes]]:
    """(1-based line, bytes) of each element of a file that is a JSON array, or an object with rows under one key.

    Raises UserError with line and column where the JSON breaks, and at an element over `MAX_RECORD`.
    """
    with open_bytes(path) as stream:
        window = _Window(stream, name)
        wrapped = _start(window) == "{"
        head = _find_rows(window).head if wrapped else b""
    with open_bytes(path) as stream:
        stream.read(len(head))
        window = _Window(stream, name, head)
        if not wrapped:
            _start(window)
            window.expect("[")
        for _ in _elements(window):
            yield window.line, window.take()
        if not wrapped:  # nothing may follow an array
            _expect_end(window, "array")


def read_frame(path: PurePath, name: str) -> Frame:
    """The text before and after the rows. Raises the errors of `read_array`."""
    with open_bytes(path) as stream:
        window = _Window(stream, name)
        if _start(window, keep=True) == "{":
            return _find_rows(window)
        window.expect("[", keep=True)
        head = window.take()
        for _ in _elements(window):
            pass
        window.at -= 1
        window.mark = window.at
        window.at += 1
        _expect_end(window, "array", keep=True)
        return Frame(head, window.take())


def _start(window: _Window, keep: bool = False) -> str:
    window.grow()
    window.at = int(window.text.startswith("\ufeff"))
    return window.next(keep)


def _expect_end(window: _Window, what: str, keep: bool = False) -> None:
    if window.next(keep):
        raise window.broken(f"text after the end of the {what}", window.at)


def _elements(window: _Window) -> Iterator[Any]:
    """The values of the array whose `[` was read, each with the mark at its start and the place behind it.

    At the end the place is behind the `]`.
    """
    if window.next() == "]":  # an empty array closes at once; after a comma an element must come
        window.at += 1
        return
    while True:
        window.next()
        yield window.value()
        if window.expect(",]") == "]":
            return


def _find_rows(window: _Window) -> Frame:
    """The frame of the only list of rows in the object that starts here.

    It is written into every output, so nothing in it may be rows to another reader.
    """
    found: dict[str, Frame] = {}
    others: dict[str, bool] = {}  # whether what is there may be rows, too
    before = bytearray()
    window.expect("{", keep=True)
    while window.next(keep=True) != "}" or found or others:
        window.expect('"', keep=True)
        window.at -= 1
        key = window.value()
        if key in found or key in others:
            raise UserError(f"{window.name}: key {key!r} appears twice in the object around the rows; remove one")
        window.expect(":", keep=True)
        if window.next(keep=True) == "[":
            window.at += 1
            before += window.take()
            kinds = {isinstance(element, dict) for element in _elements(window)}
            window.at -= 1
            window.mark = window.at
            window.at += 1
            if kinds == {True} and key not in ROW:
                found[key] = Frame(bytes(before), b"")
                before.clear()
            else:
                others[key] = key in ROW or bool(kinds)
        else:
            window.value()
            others[key] = key in ROW
        mark = window.expect(",}", keep=True)
        before += window.take()
        if len(before) > MAX_RECORD:
            raise too_large(f"{window.name}:{window.line}", "text around the rows", MAX_RECORD)
        if mark == "}":
            break
    else:
        window.at += 1
    _expect_end(window, "object", keep=True)
    before += window.take()
    if len(found) != 1:
        what = f"lists of rows under several keys ({', '.join(found)})" if found else "no list of rows in it"
        raise UserError(f"{window.name}: one JSON object with {what}; give an array of rows, or one row a line (jsonl)")
    if doubtful := next((key for key, may_be in others.items() if may_be), None):
        raise UserError(f"{window.name}: {doubtful!r} next to a list of rows may also hold rows; give an array of rows")
    (frame,) = found.values()
    return Frame(frame.head, bytes(before))
