"""Rows of a file, and what an error says."""

from gradshield.data import open_source, read_rows

GOOD = b'{"prompt": "hi", "response": "yo"}'


def rows_of(path, **options):
    return list(read_rows(open_source(path, **options)))


def one_line(excinfo):
    message = str(excinfo.value)
    assert "\n" not in message
    return message
