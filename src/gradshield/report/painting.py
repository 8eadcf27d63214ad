"""Text in pieces, marked by their tokens' shares of FIHS: the same marks in the report and on the review page."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from gradshield.report.text import number, percent


class Piece(NamedTuple):
    """A stretch of text marked alike: `level` is "" or p1 … p4 (towards complying), n1 … n4 (towards refusing)."""

    text: str
    level: str = ""
    share: str = ""


def marked(text: str, share: float, steps: Sequence[float]) -> Piece:
    """The text, marked by how many of the four steps, ascending, the size of its share reaches."""
    level = sum(abs(share) >= step for step in steps)
    if not level:
        return Piece(text)
    said = percent(share) if abs(share) >= 0.005 else f"{number(100 * share)}\u00a0%"
    return Piece(text, f"{'p' if share > 0 else 'n'}{level}", said)


def cut(pieces: Iterable[Piece], characters: float = math.inf) -> tuple[list[Piece], int]:
    """The pieces of the first so many characters, and how many more there were."""
    shown, room, more = [], characters, 0
    for piece in pieces:
        text = piece.text if len(piece.text) <= room else piece.text[: int(room)]
        room, more = room - len(text), more + len(piece.text) - len(text)
        if text:
            shown.append(piece._replace(text=text))
    return shown, more
