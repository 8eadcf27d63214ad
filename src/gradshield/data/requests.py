"""Files of requests: the probes, and the requests of an evaluation."""

import json
from pathlib import Path

from gradshield.base.errors import UserError, one_line
from gradshield.data.records import bad_text


def read_requests(path: str | Path) -> list[str]:
    """The requests of a file: `prompt` of each jsonl line, or each line of plain text.

    Raises UserError naming a line without a request, or for a file without any.
    """
    if not Path(path).is_file():  # a pipe can be read only once, and these are read more than once
        raise UserError(f"{path}: {'not a file' if Path(path).exists() else 'no such file'}, so no requests")
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read as requests ({one_line(error)})") from error
    requests = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if line.lstrip().startswith("{"):
            try:
                line = json.loads(line)["prompt"].strip() or None
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                line = None
            if line is None:
                raise UserError(f'{path}:{number}: not a JSON object with a text as its "prompt"')
        problem = bad_text(line)
        if problem:
            raise UserError(f"{path}:{number}: {problem}")
        requests.append(line.strip())
    if not requests:
        raise UserError(f"{path}: holds no requests (one per line, or jsonl with a prompt)")
    return requests
