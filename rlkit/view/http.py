"""Serves the page and its queries over HTTP: only GET, JSON, and events when a run grows."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sqlite3
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import uvicorn
from anyio.to_thread import current_default_thread_limiter
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.gzip import GZipMiddleware
from starlette.types import ASGIApp

import rlkit
from rlkit.experience import UserError
from rlkit.view import tokens
from rlkit.view.guard import Guard, cookie_name, page_policy, refused
from rlkit.view.index import cache_folder
from rlkit.view.query import QUESTIONS, Question, ask
from rlkit.view.runs import NotThereError, Run, Runs
from rlkit.view.schema import ErrorResult, Event

PAGE = Path(__file__).parent / "page.html"
PLACEHOLDER = """<!doctype html><title>rlkit view</title><p>This installation has no page (rlkit/view/page.html).
Queries are answered: <a href="/api/runs">/api/runs</a>, <a href="/api/schema">/api/schema</a>."""
FORWARD = '<!doctype html><title>rlkit</title><meta http-equiv="refresh" content="0;url=/">'
"""Removes the token from the address once the cookie has it. A redirect from an external link would lack the cookie."""
PORTS = 65536
LOOK_SECONDS = 1.0
"""Interval at which the runs' files are checked."""
HEARTBEAT_SECONDS = 15.0
SMALLEST_GZIP = 1024
THREADS = 8
"""Threads that answer; each keeps a few connections of its own."""


def page_text() -> str:
    """Return the page, or a placeholder if the package was built without it."""
    return PAGE.read_text(encoding="utf-8") if PAGE.is_file() else PLACEHOLDER


def make_app(runs: Runs, host: str, token: str | None, ending: threading.Event) -> ASGIApp:
    """Make the app of a server that listens on `host`. `ending` is set when it stops, so that event streams end."""
    app = FastAPI(
        title="rlkit view", version=rlkit.__version__, docs_url=None, redoc_url=None, openapi_url="/api/schema"
    )
    for path, question in QUESTIONS.items():
        _add(app, runs, path, question)

    async def events() -> Response:
        return StreamingResponse(_events(runs, ending), media_type="text/event-stream")

    async def page(request: Request) -> Response:
        if token is not None and "token" in request.query_params:
            response = HTMLResponse(FORWARD)
            response.set_cookie(cookie_name(request), token, httponly=True, samesite="strict", path="/")
            return response
        text = await asyncio.to_thread(page_text)
        return HTMLResponse(text, headers={"Content-Security-Policy": page_policy(text) + "; frame-ancestors 'none'"})

    async def failed(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            return refused(error.status_code, str(error.detail))
        if isinstance(error, UserError):
            return refused(404 if isinstance(error, NotThereError) else 400, str(error))
        return refused(500, f"{type(error).__name__}: {error} (the index of samples is in {cache_folder()})")

    app.get("/api/events", response_class=Response, responses={200: {"model": Event}})(events)
    app.get("/", include_in_schema=False)(page)
    for kind in (HTTPException, UserError, sqlite3.Error, OSError):
        app.exception_handler(kind)(failed)
    app.add_middleware(GZipMiddleware, minimum_size=SMALLEST_GZIP, compresslevel=5)
    return Guard(app, host, token)


def _add(app: FastAPI, runs: Runs, path: str, question: Question) -> None:
    """Add a route. `ask` checks the parameters, with clearer messages than FastAPI, which only describes them."""

    def answer(request: Request) -> Response:
        result = ask(runs, path, dict(request.query_params))
        return Response(result.model_dump_json(), media_type="application/json")

    parameters = question.asked.model_json_schema()
    described = [
        {"name": name, "in": "query", "required": name in parameters.get("required", ()), "schema": schema}
        for name, schema in parameters.get("properties", {}).items()
    ]
    app.get(
        path,
        response_model=question.result,
        description=question.about,
        responses={400: {"model": ErrorResult}, 404: {"model": ErrorResult}},
        openapi_extra={"parameters": described},
    )(answer)


async def _events(runs: Runs, ending: threading.Event) -> AsyncIterator[str]:
    """Yield an event per run that grew or ended since the last check, and comments as heartbeats."""
    seen: dict[str, object] = {run.id: run.stamp() for run in runs.all()}
    states: dict[str, str] = {}
    quiet = 0.0
    yield ": rlkit\n\n"
    while not ending.is_set():
        await asyncio.sleep(LOOK_SECONDS)
        quiet += LOOK_SECONDS
        for run in await asyncio.to_thread(runs.all):
            with contextlib.suppress(OSError, sqlite3.Error):  # the next query reports it
                stamp, (state, _) = run.stamp(), await asyncio.to_thread(run.state)
                if seen.get(run.id) != stamp or states.get(run.id, state) != state:
                    event = await asyncio.to_thread(_event, run)
                    yield f"data: {event.model_dump_json()}\n\n"
                    quiet = 0.0
                seen[run.id], states[run.id] = stamp, state
        if quiet >= HEARTBEAT_SECONDS:
            quiet = 0.0
            yield ": still here\n\n"


def _event(run: Run) -> Event:
    run.index.follow(LOOK_SECONDS)
    (count,) = run.index.all("SELECT count(*) FROM rows")
    return Event(run=run.id, step=run.metrics.step, state=run.state()[0], samples=count)


@contextlib.contextmanager
def listening(host: str, port: int, tries: int) -> Iterator[socket.socket]:
    """Yield a socket on the first free port from `port` on. Raises UserError if there is none."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UserError(f"--host {host}: there is no such host: {error.strerror}") from error
    if not 0 <= port < PORTS:
        raise UserError(f"--port {port}: ports are 1 to {PORTS - 1}, or 0 for any free one")
    for candidate in range(port, min(port + tries, PORTS)):
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((address[0], candidate, *address[2:]))
            listener.listen()
        except OSError as error:
            listener.close()
            problem = error
            continue
        with listener:
            yield listener
        return
    raise UserError(f"--host {host} --port {port}: cannot listen there: {problem.strerror}; choose another port")


class _Server(uvicorn.Server):
    """Ends event streams on signals; uvicorn would wait for them."""

    ending: threading.Event

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def end(self) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True
        self.ending.set()


def serve(runs: Runs, host: str, token: str | None, listener: socket.socket) -> None:
    """Serve until Ctrl-C or SIGTERM."""
    ending = threading.Event()
    follower = threading.Thread(target=_follow_all, args=(runs, ending), name="index", daemon=True)
    follower.start()
    app = make_app(runs, host, token, ending)
    server = _Server(
        uvicorn.Config(
            app, log_level="warning", access_log=False, server_header=False, lifespan="off", timeout_graceful_shutdown=2
        )
    )
    server.ending = ending
    asyncio.run(_serve(server, listener))
    ending.set()
    follower.join(5.0)


async def _serve(server: _Server, listener: socket.socket) -> None:
    current_default_thread_limiter().total_tokens = THREADS
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, server.end)
    await server.serve(sockets=[listener])


def _follow_all(runs: Runs, ending: threading.Event) -> None:
    """Index in the background, so that answers do not wait for a long file."""
    while not ending.wait(LOOK_SECONDS):
        for run in runs.all():
            with contextlib.suppress(OSError, sqlite3.Error):  # the next query reports it
                while not ending.is_set() and not run.index.follow(LOOK_SECONDS):
                    pass
        tokens.load()
