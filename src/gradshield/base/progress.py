"""Progress on anything over two seconds: a bar with rate and time left on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[int, int], None]
"""Called with how many tokens and rows were just finished."""


@contextmanager
def progress(title: str, tokens: int, rows: int, done_tokens: int = 0, done_rows: int = 0) -> Iterator[Advance]:
    """Shows the way to `tokens` and `rows`; what was done by an earlier run counts as done but not in the rate.

    Where no tokens are counted (0), rows alone say how far it is; where `rows` is 0, too, nobody knows yet how many.
    """
    if sys.stderr.isatty():
        with _bar(title, tokens, rows, done_tokens, done_rows) as advance:
            yield advance
    else:
        yield _lines(title, tokens, rows, done_tokens, done_rows)


@contextmanager
def _bar(title: str, tokens: int, all_rows: int, done_tokens: int, done_rows: int) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[rows]:,}{task.fields[of]} rows · {task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(
            title,
            total=tokens or all_rows or None,
            completed=done_tokens or done_rows,
            rows=done_rows,
            of=_of(all_rows),
            rate="",
        )
        state, shown, new = _Rate(done_rows), 0.0, 0

        def advance(tokens: int, rows: int) -> None:
            nonlocal shown, new
            state.add(tokens, rows)
            new += tokens or rows
            now = time.monotonic()
            if now - shown > 0.1 or state.rows == all_rows:  # rows may come by the million
                bar.update(task, advance=new, rows=state.rows, rate=state.text())
                shown, new = now, 0

        yield advance


def _lines(title: str, tokens: int, rows: int, done_tokens: int, done_rows: int) -> Advance:
    start = shown = time.monotonic()
    state, done = _Rate(done_rows), done_tokens

    def advance(new_tokens: int, new_rows: int) -> None:
        nonlocal shown, done
        state.add(new_tokens, new_rows)
        done += new_tokens
        now = time.monotonic()
        if now - shown > 10 or (state.rows == rows and now - start > 2):
            shown = now
            pace = max(state.tokens_per_second() or state.rows_per_second(), 1e-9)
            left = f", {(tokens - done or rows - state.rows) / pace:.0f} s left" if rows else ""
            print(f"{title}: {state.rows:,}{_of(rows)} rows, {state.text()}{left}", file=sys.stderr, flush=True)

    return advance


def _of(rows: int) -> str:
    return f"/{rows:,}" if rows else ""


class _Rate:
    """Rows and tokens so far, and how fast they came."""

    def __init__(self, rows: int) -> None:
        self.start, self.before, self.rows, self.tokens = time.monotonic(), rows, rows, 0

    def add(self, tokens: int, rows: int) -> None:
        self.tokens += tokens
        self.rows += rows

    def tokens_per_second(self) -> float:
        return self.tokens / max(time.monotonic() - self.start, 1e-9)

    def rows_per_second(self) -> float:
        return (self.rows - self.before) / max(time.monotonic() - self.start, 1e-9)

    def text(self) -> str:
        tokens = f", {self.tokens_per_second():,.0f} tokens/s" if self.tokens else ""
        return f"{self.rows_per_second():,.1f} rows/s{tokens}"
