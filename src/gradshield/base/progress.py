"""Progress on anything over two seconds: a bar on a terminal, plain lines elsewhere; a rate, and one time left."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Advance = Callable[[int, int], None]
"""Called with how many tokens and rows were just finished."""
_following: ContextVar[int | None] = ContextVar("_following", default=0)


@contextmanager
def followed_by(tokens: int | None) -> Iterator[None]:
    """Context in which the time left includes `tokens` of later work, at the same speed. None: the size of the later
    work is unknown, so the line says that the time left is that of this step."""
    before = _following.set(tokens)
    try:
        yield
    finally:
        _following.reset(before)


@contextmanager
def progress(
    title: str, tokens: int, rows: int, done_tokens: int = 0, done_rows: int = 0, unit: str = "rows"
) -> Iterator[Advance]:
    """Shows how much of `tokens` and `rows` is done. The work of an earlier run counts as done, but not in the rate.

    The time left is computed from tokens, or from rows if `tokens` is 0. If `rows` is 0 as well, the end is unknown.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    terminal = sys.stderr.isatty()
    texts = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"))
    total, done = tokens or rows, done_tokens or done_rows
    later = _following.get()
    if later and not tokens:
        later = 0  # rows have another speed than tokens
    note = " in this step" if later is None else ", later steps included" if later else ""
    start = shown = time.monotonic()
    count, new = done_rows, 0
    with Progress(*texts, console=Console(stderr=True), disable=not terminal) as bar:
        task = bar.add_task(title, total=total or None, completed=done, text="")

        def advance(new_tokens: int, new_rows: int) -> None:
            nonlocal shown, count, new
            count, new, now = count + new_rows, new + (new_tokens or new_rows), time.monotonic()
            ended = count == rows and (terminal or now - start > 2)
            if now - shown < (0.1 if terminal else 10) and not ended:
                return  # rows may come by the million
            shown, passed = now, max(now - start, 1e-9)
            text = f"{count:,}{f'/{rows:,}' if rows else ''} {unit}, {(count - done_rows) / passed:,.1f} {unit}/s"
            if total:
                left = (total - done - new + (later or 0)) * passed / max(new, 1)
                text += f", {left:.0f} s left{note}"
            bar.update(task, completed=done + new, text=text)
            if not terminal:
                print(f"{title}: {text}", file=sys.stderr, flush=True)

        yield advance
