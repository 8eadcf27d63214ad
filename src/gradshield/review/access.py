"""Who may talk to the page: only this machine, only the browser that was handed the address, only the page itself.

Dataset text is escaped before it is shown; should that ever fail, the policy below leaves it nothing to run or to call.
"""

import secrets
from urllib.parse import parse_qs

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import HTMLResponse, PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Cache-Control": "no-store",
}
# The cookie is strict, so it is sent only with what the page itself asks for: a page that redirects itself does, while
# a redirect would still count as the request of whoever followed the link.
_ENTRY_PAGE = (
    '<!doctype html><html lang="en"><meta charset="utf-8"><title>GradShield</title>'
    '<link rel="icon" href="/static/icon.svg">'
    '<meta http-equiv="refresh" content="0;url=/"><p><a href="/">Go on to the review</a></p></html>'
)
_ADDRESS_USED_UP = (
    "This page is for the browser that opened the address printed by `gradshield review`, which works once.\n"
    "Stop it with Ctrl-C and start it again for a new address.\n"
)


class Guard:
    """Lets through what has the session's cookie, which is handed out once, for the token in the address."""

    def __init__(self, app: ASGIApp, port: int) -> None:
        self.app = app
        self.hosts = (f"127.0.0.1:{port}", f"localhost:{port}")
        self.cookie = f"gradshield-{port}"  # cookies are shared by all ports of a host
        self.token: str | None = secrets.token_urlsafe(32)
        self.session = secrets.token_urlsafe(32)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await (self._refusal(scope) or self.app)(scope, receive, send_guarded)

    def _refusal(self, scope: Scope) -> ASGIApp | None:
        """The response instead of the page, or None if the page may respond."""
        headers = Headers(scope=scope)
        if headers.get("host") not in self.hosts:  # a name that someone else made point here
            return PlainTextResponse("This address is not the one printed by `gradshield review`.\n", 403)
        if scope["path"] == "/enter" and scope["method"] == "GET":
            return self._enter(scope, headers)
        if not scope["path"].startswith("/static/") and not self._known(headers):
            return PlainTextResponse(_ADDRESS_USED_UP, 403)
        if scope["method"] == "POST" and headers.get("origin") not in [f"http://{host}" for host in self.hosts]:
            return PlainTextResponse("Only the review page itself may decide.\n", 403)
        return None

    def _enter(self, scope: Scope, headers: Headers) -> ASGIApp:
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        if self.token and secrets.compare_digest(given.encode(), self.token.encode()):
            self.token = None
            response = HTMLResponse(_ENTRY_PAGE)
            response.set_cookie(self.cookie, self.session, httponly=True, samesite="strict")
            return response
        return HTMLResponse(_ENTRY_PAGE) if self._known(headers) else PlainTextResponse(_ADDRESS_USED_UP, 403)

    def _known(self, headers: Headers) -> bool:
        given = cookie_parser(headers.get("cookie", "")).get(self.cookie, "")
        return secrets.compare_digest(given.encode(), self.session.encode())
