"""Against a real server on this machine, which is late, busy, broken or talks nonsense."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from scored import rows_of, scored

from gradshield.base.errors import UserError


def reply(**scores) -> bytes:
    flagged = any(value > 0.5 for value in scores.values())
    return json.dumps({"id": "x", "model": "m", "results": [{"flagged": flagged, "category_scores": scores}]}).encode()


@contextmanager
def server(answers: dict[str, list]) -> Iterator[tuple[str, list[str]]]:
    """Answers a text that holds a key with its list's next (status, body, seconds of delay), the last again and again;
    every other text with a score of .01."""
    got: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["input"]
            got.append(asked)
            mine = next((answers[key] for key in answers if key in asked), [(200, reply(hate=0.01), 0)])
            status, body, delay = mine.pop(0) if len(mine) > 1 else mine[0]
            time.sleep(delay)
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Retry-After", "0.01")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            with suppress(OSError):  # the caller has given up
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}/v1", got
    finally:
        httpd.shutdown()
        httpd.server_close()


def test_a_row_scores_as_its_highest_category_and_all_its_turns_are_asked_about(tiny):
    with server({"bad": [(200, reply(hate=0.2, violence=0.9), 0)]}) as (url, got):
        found = scored(tiny, f"moderation:url={url}", rows_of(tiny, [("bad request", "Sure"), ("hello", "Hi")]))
    assert found["score"].tolist() == [0.9, 0.01] and found["flagged"].tolist() == [1, 0]
    assert sorted(got) == ["Hello", "bad request\n\nSure", "hello\n\nHi"]


def test_a_busy_endpoint_is_asked_again(tiny):
    busy = [(429, b"{}", 0), (503, b"{}", 0), (200, reply(hate=0.7), 0)]
    with server({"bad": busy}) as (url, got):
        found = scored(tiny, f"moderation:url={url}", rows_of(tiny, [("bad", "Sure")]))
    assert found["score"].tolist() == [0.7] and len(got) == 4 and not found.reasons


GARBAGE = [b"<html>", b"{half", b"[]", b'{"results": []}', b'{"results": [{"category_scores": {"hate": "no"}}]}']
GARBAGE += [reply(), reply(hate=float("nan")), reply(hate=7)]


@pytest.mark.parametrize("body", GARBAGE)
def test_garbage_sets_its_row_aside_and_no_other(tiny, body):
    with server({"bad": [(200, body, 0)]}) as (url, _):
        found = scored(tiny, f"moderation:url={url}", rows_of(tiny, [("hello", "Hi"), ("bad", "Sure")]))
    assert list(found.reasons) == [1] and "can't be read" in found.reasons[1]
    assert np.isnan(found["score"][1]) and found["score"][0] == 0.01


FAILURES = [((429, b"{}", 0), 2), ((500, b"{}", 0), 2), ((200, reply(hate=1), 1.5), 2), ((400, b"{}", 0), 1)]


@pytest.mark.parametrize(("answer", "calls"), FAILURES)
def test_an_endpoint_that_fails_to_the_end_sets_the_row_aside(tiny, answer, calls):
    with server({"bad": [answer]}) as (url, got):
        spec = f"moderation:url={url},attempts=2,timeout=0.5"
        found = scored(tiny, spec, rows_of(tiny, [("hello", "Hi"), ("bad", "Sure")]))
    assert list(found.reasons) == [1] and "no answer from the moderation endpoint" in found.reasons[1]
    assert np.isnan(found["score"][1]) and sum("bad" in text for text in got) == calls


def test_an_endpoint_that_is_not_there_is_said_before_any_row(tiny):
    with pytest.raises(UserError, match=r"moderation:url=http://127.0.0.1:9/v1: no answer .* check the address"):
        scored(tiny, "moderation:url=http://127.0.0.1:9/v1,attempts=1", rows_of(tiny, [("hello", "Hi")]))


def test_openais_key_goes_to_openai_only(tiny, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    seen = []
    import openai

    class Client(openai.OpenAI):
        def __init__(self, **how):
            seen.append(how["api_key"])
            super().__init__(**how)

    monkeypatch.setattr(openai, "OpenAI", Client)
    with server({}) as (url, _):
        scored(tiny, f"moderation:url={url}", rows_of(tiny, [("hello", "Hi")]))
    assert seen == ["none"]
