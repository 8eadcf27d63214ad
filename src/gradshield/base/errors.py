"""The one exception for a user's mistake: a single line that says what is wrong, where, and what to do."""


class UserError(Exception):
    """Raised for anything the user can fix; the command line prints it on one line and exits with code 2."""


class Diverged(UserError):
    """A model whose loss is no longer finite, after so many `steps` of training; where several processes train, all of
    them raise it."""

    def __init__(self, message: str, steps: int = 0) -> None:
        super().__init__(message)
        self.steps = steps


def out_of_memory(error: BaseException) -> bool:
    """True for an allocation that failed, whichever device it was on. A CPU's is a plain RuntimeError in torch."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
    )


def first_line(error: BaseException, limit: int = 300) -> str:
    """What a library's error says, on one line: its first, with the second where a colon announces it, or its type's
    name where it says nothing."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    line = (" ".join(lines[:2]) if lines[0].endswith(":") else lines[0]).rstrip(".:")
    return line if len(line) <= limit else f"{line[: limit - 1]}…"
