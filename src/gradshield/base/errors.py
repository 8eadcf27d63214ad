"""The one exception for a user's mistake: a single line that says what is wrong, where, and what to do."""


class UserError(Exception):
    """Raised for any error that the user can fix. The command line prints it on one line and exits with code 2."""


class Diverged(UserError):
    """The loss is no longer finite after `steps` training steps. If several processes train, all of them raise it."""

    def __init__(self, message: str, steps: int = 0) -> None:
        super().__init__(message)
        self.steps = steps


def out_of_memory(error: BaseException) -> bool:
    """True for a failed allocation on any device. On a CPU, torch raises a plain RuntimeError for it."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
    )


def first_line(error: BaseException, limit: int = 300) -> str:
    """The first line of a library's error message, with the second line if the first ends in a colon. If the message is
    empty, the name of the error's type.
    """
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    line = (" ".join(lines[:2]) if lines[0].endswith(":") else lines[0]).rstrip(".:")
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def one_line(error: object, limit: int = 200) -> str:
    """The message of an error in one line."""
    return " ".join(str(error).split())[:limit]
