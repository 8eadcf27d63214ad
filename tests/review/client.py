"""A browser without a script for the review page, and a server for it."""

import http.client
import json
import re
import threading
from contextlib import contextmanager
from urllib.parse import urlencode

from report.made import Page as ReportPage

from gradshield.review.server import open_server
from gradshield.review.state import Review


class Page(ReportPage):
    """The report's reader, for pages that have fields."""

    def handle_starttag(self, tag, attrs):
        super().handle_starttag(tag, attrs)
        if tag == "input":
            self.open.pop()


class Client:
    """A browser without a script: it keeps the cookie, and says where a form came from."""

    def __init__(self, address):
        self.port = int(re.search(r":(\d+)/", address)[1])
        self.enter = address.split(str(self.port))[1]
        self.cookie = ""

    def ask(self, path, method="GET", body=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        given = {"Cookie": self.cookie, **({"Origin": f"http://127.0.0.1:{self.port}"} if body is not None else {})}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, {k: v for k, v in given.items() if v})
        answer = connection.getresponse()
        answer.text = answer.read().decode()
        connection.close()
        return answer

    def open(self):
        answer = self.ask(self.enter)
        assert answer.status == 200
        self.cookie = answer.headers["Set-Cookie"].split(";")[0]
        return answer

    def post(self, path, form, **headers):
        return self.ask(path, "POST", urlencode(form), **headers)

    def done(self, path, form):
        return json.loads(self.post(path, form, Accept="application/json").text)

    def page(self, path="/", **given):
        answer = self.ask(f"{path}?{urlencode(given)}")
        assert answer.status == 200, answer.text
        return answer.text


@contextmanager
def serving(out, other=None, who="ann"):
    server, listening, address = open_server(Review(out, other, who), 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        yield Client(address)
    finally:
        server.should_exit = True
        thread.join(10)
