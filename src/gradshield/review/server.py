"""The review page's server: HTML made here on every request, one small script, nothing from outside.

Each view is an address, so reloading, going back and a second tab just work, and without the script, too; the script
fetches the same addresses and puts what changed in place.
"""

import getpass
import math
import re
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from urllib.parse import parse_qs, parse_qsl, urlsplit

from gradshield.base.errors import UserError
from gradshield.review import store
from gradshield.review.page import render_review, row_number, rows_to_decide
from gradshield.review.state import Review

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response
    from starlette.routing import Mount, Route
    from starlette.staticfiles import StaticFiles

    from gradshield.review.access import Guard
except ImportError as error:
    raise UserError("gradshield review needs two more packages: pip install starlette uvicorn") from error

HOST = "127.0.0.1"
_FORM = 64_000  # bytes


def serve(out: Path, other: Path | None, port: int, who: str | None, announce: Callable[[str], None]) -> None:
    """Serves the review of `out` on 127.0.0.1 until it is stopped; its address goes to `announce` once it listens.

    `who` is the login name unless given. Raises UserError for what is no run, and as `open_server` does.
    """
    server, listening, address = open_server(Review(out, other, who or _login()), port)
    announce(address)
    try:
        server.run(sockets=[listening])
    except KeyboardInterrupt as stop:
        stop.add_note(f"{out} keeps every decision")
        raise


def open_server(review: Review, port: int) -> tuple[uvicorn.Server, socket.socket, str]:
    """A server, the socket that it is to serve, and the address to open, which works once. Port 0 is any that is free.

    Raises UserError for a port that is taken.
    """
    try:
        listening = socket.create_server((HOST, port))
    except (OSError, OverflowError) as error:
        raise UserError(f"--port {port}: can't listen there ({error}); choose another, or 0 for any") from None
    port = listening.getsockname()[1]
    guard = Guard(make_app(review), port)
    config = uvicorn.Config(guard, log_level="warning", server_header=False, ws="none", timeout_graceful_shutdown=1)
    return uvicorn.Server(config), listening, f"http://{HOST}:{port}/enter?token={guard.token}"


def _login() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user without a name, as in some containers
        return "somebody"


def make_app(review: Review) -> Starlette:
    """The pages and what they post to, without the guard in front of them."""

    def page(request: Request) -> Response:
        return HTMLResponse(render_review(review, request.url.path, dict(request.query_params)))

    def version(_: Request) -> Response:
        return JSONResponse({"version": store.version(review.out)})

    def as_json(_: Request) -> Response:
        return _download(store.export_json(review.out), "application/json", "decisions.json")

    def as_csv(_: Request) -> Response:
        return _download(store.export_csv(review.out, review.scores.place), "text/csv", "decisions.csv")

    def explanation(request: Request) -> Response:
        state, doing = review.worker.state(_row(review, request.path_params["row"]))
        return JSONResponse({"state": state, "doing": doing})

    routes = [
        Route("/", page),
        *([Route("/compare", page)] if review.other else []),
        Route("/version", version),
        Route("/decisions.json", as_json),
        Route("/decisions.csv", as_csv),
        Route("/explanation/{row}", explanation),
        *(
            Route(f"/{name}", partial(_post, partial(action, review)), methods=["POST"])
            for name, action in (
                ("decide", _decide),
                ("decide-all", _decide_all),
                ("undo", _undo),
                ("threshold", _move),
                ("explain", _explain),
            )
        ),
        Mount("/static", StaticFiles(directory=Path(__file__).with_name("static"))),
    ]
    return Starlette(routes=routes, exception_handlers={UserError: _error_response, HTTPException: _error_response})


async def _post(action: Callable[[dict[str, str]], dict], request: Request) -> Response:
    """Does what the form asks for; the script gets what came of it, a plain form goes back to its page."""
    body = b""
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > _FORM:
                raise HTTPException(413, "The note is too long.")
    except ClientDisconnect:
        return Response(status_code=400)  # half a form decides nothing, and nobody is there to read this
    form = {
        name: values[0] for name, values in parse_qs(body.decode("utf-8", "replace"), keep_blank_values=True).items()
    }
    result = await run_in_threadpool(action, form)
    if "application/json" in request.headers.get("accept", ""):
        return JSONResponse(result)
    path, query = _view_of(form)
    return RedirectResponse(f"{path or '/'}?{query}", 303)


def _view_of(form: dict[str, str]) -> tuple[str, str]:
    """(path, query) of the page that the form goes back to; no path where it is none of this server's."""
    try:
        back = urlsplit(form.get("back", ""))
    except ValueError:
        return "", ""
    here = not back.netloc and back.path in ("/", "/compare")
    return back.path if here else "", back.query


def _decide(review: Review, form: dict[str, str]) -> dict:
    row = _row(review, form.get("row"))
    if review.scores.aside[row - 1]:
        raise HTTPException(409, f"Row {row} is set aside: without a score it can't be decided. Fix it in the file.")
    if form.get("verdict") not in store.CHOICES:
        raise HTTPException(400, "A row is kept, quarantined or undecided.")
    before = review.decisions()[1].get(row)
    entry = store.decide(review.out, row, form["verdict"], form["note"].strip() if "note" in form else None, review.who)
    instead = before and before.verdict != entry.verdict and f"{before.verdict} by {before.who}"
    return {"id": entry.id, "at": entry.at, "row": row, "verdict": entry.verdict, "instead_of": instead or None}


def _decide_all(review: Review, form: dict[str, str]) -> dict:
    """Decides every row of the view that the form goes back to, if it is still what was seen."""
    verdict, (path, query), seen = form.get("verdict", ""), _view_of(form), form.get("version", "")
    if verdict not in store.CHOICES:
        raise HTTPException(400, "A row is kept, quarantined or undecided.")
    if not path or (path == "/compare" and not review.other) or not re.fullmatch(r"[0-9]{1,12}", seen):
        raise HTTPException(400, "Which rows, and as of which version, are to be decided?")
    rows = rows_to_decide(review, path, dict(parse_qsl(query)))
    made = store.decide_all(review.out, rows, verdict, review.who, int(seen)) if rows else None
    if made is None:
        raise HTTPException(409, "The rows changed since this page was loaded, so nothing was decided. Look again.")
    first, last = made
    return {"id": first.id, "last": last.id, "at": first.at, "rows": len(rows), "verdict": verdict}


def _undo(review: Review, form: dict[str, str]) -> dict:
    if "last" in form:
        ids = row_number(form.get("id")), row_number(form["last"])
        return {"rows": store.undo_all(review.out, *ids, form.get("at", ""), review.who)}
    made = (row_number(form.get("row")), form["at"]) if "at" in form else None
    entry = store.undo(review.out, row_number(form.get("id")) or None, review.who, made)
    return {"row": entry and entry.row, "verdict": entry and entry.verdict}


def _move(review: Review, form: dict[str, str]) -> dict:
    try:
        value = float(form["value"]) if form.get("value") else None
        value = None if value == review.own else value
        if value is not None and (math.isnan(value) or value == -math.inf):
            raise ValueError
    except ValueError:
        raise HTTPException(400, "The threshold is a number.") from None
    entry = store.move_threshold(review.out, value, review.who)
    return {"id": entry.id, "at": entry.at, "row": 0}


def _explain(review: Review, form: dict[str, str]) -> dict:
    row = _row(review, form.get("row"))
    review.worker.ask(row)
    return {"row": row}


def _row(review: Review, text: str | None) -> int:
    row = row_number(text)
    if not 1 <= row <= len(review.scores.score):
        raise HTTPException(404, "There is no row with this number.")
    return row


def _error_response(_: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        return PlainTextResponse(error.detail, error.status_code)
    return PlainTextResponse(str(error), 500)


def _download(text: str, kind: str, name: str) -> Response:
    return Response(text, media_type=kind, headers={"Content-Disposition": f'attachment; filename="{name}"'})
