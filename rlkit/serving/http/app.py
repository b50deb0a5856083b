"""Who may ask a reward server, and how much at a time: decided before anything of a body is read.

The HTTP face of a served reward: POST /v1/score, GET /health, /metrics and /v1/schema.

A reward server from its start to its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import ValidationError
from starlette.exceptions import HTTPException

import rlkit
from rewards.base import RewardContext
from rlkit.config.command import print_error
from rlkit.experience import Group
from rlkit.experience.scores import RewardFailed
from rlkit.experience.wire import (
    HEALTH_PATH,
    METRICS_PATH,
    SCHEMA_PATH,
    SCHEMA_VERSION,
    SCORE_PATH,
    Health,
    Needs,
    ScoreRequest,
    ScoreResponse,
    from_wire,
    scores_to_wire,
)
from rlkit.serving.http.config import ResolvedServe, is_loopback
from rlkit.serving.http.process import RewardProcess, model_version
from rlkit.serving.http.queue import BatchLimits, BusyError, ScoringQueue, ServerMetrics

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Guard:
    """ASGI middleware: a token if there is one, else only names of this machine; JSON; bodies of a bounded size."""

    def __init__(self, app: App, token: str | None, max_body_bytes: int) -> None:
        self.app, self.max_body_bytes = app, max_body_bytes
        self._token = None if token is None else token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 401, 403, 413 or 415, or pass the request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        problem = self._problem(scope["method"], headers)
        if problem is not None:
            await answer(send, *problem)
            return
        await self.app(scope, self._counted(receive), send)

    def _problem(self, method: str, headers: dict[bytes, bytes]) -> tuple[int, str] | None:
        if self._token is not None:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not secrets.compare_digest(given.strip(), self._token):
                return 401, "this server wants its token: Authorization: Bearer ..."
        elif not is_loopback(_host_name(headers.get(b"host", b""))):
            # A web page whose name was made to point at 127.0.0.1 would be let in by the browser.
            return 403, "without a token this server answers only to localhost and loopback addresses"
        if method != "POST":
            return None
        if headers.get(b"content-type", b"").partition(b";")[0].strip().lower() != b"application/json":
            return 415, "this server reads application/json"
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self.max_body_bytes:
            return self._too_large()
        return None

    def _too_large(self) -> tuple[int, str]:
        return 413, f"a request has at most {self.max_body_bytes} bytes (serve.max_body_mib); send fewer groups at once"

    def _counted(self, receive: Receive) -> Receive:
        """Bodies without Content-Length are counted while they come."""
        size = 0

        async def counted() -> MutableMapping[str, Any]:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.max_body_bytes:
                raise HTTPException(*self._too_large())  # from inside the route, whose framework answers it
            return message

        return counted


async def answer(send: Send, status: int, error: str) -> None:
    """An error as JSON. The connection is closed: what was left of the body is not read."""
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers.append((b"connection", b"close"))
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _host_name(host: bytes) -> str:
    """`localhost:8000` -> `localhost`, `[::1]:8000` -> `::1`."""
    text = host.decode("latin-1")
    return text[1:].partition("]")[0] if text.startswith("[") else text.partition(":")[0]


SHOWN_PROBLEMS = 5


class RewardServer:
    """One served reward: its processes, its queue, and what it says about itself."""

    def __init__(self, resolved: ResolvedServe) -> None:
        self.resolved, self.metrics = resolved, ServerMetrics()
        serve, reward = resolved.serve, resolved.reward
        context = RewardContext(
            device=serve.device, gpus=float(serve.device == "cuda"), seed=resolved.seed, threads=serve.threads
        )
        options = {key: value for key, value in reward.items() if key != "_target_"}
        timeout = resolved.reward_config.timeout_seconds
        workers = [
            RewardProcess(reward["_target_"], options, context, serve.startup_timeout_seconds, timeout)
            for _ in range(resolved.reward_config.workers)
        ]
        limits = BatchLimits(serve.max_batch_samples, serve.max_batch_tokens, serve.max_queued_samples)
        self.queue = ScoringQueue(workers, limits, self.metrics)
        self.model_version = model_version(reward)
        self.max_body_bytes = int(serve.max_body_mib * 2**20)

    def health(self) -> Health:
        """Down: no process could be started. (The next request tries again.)"""
        cls, config = self.resolved.reward_class, self.resolved.reward_config
        traits = cls.traits(config)
        return Health(
            status="ok" if any(worker.usable for worker in self.queue.workers) else "down",
            schema_version=SCHEMA_VERSION,
            rlkit_version=rlkit.__version__,
            reward=self.resolved.reward["_target_"],
            model_version=self.model_version,
            needs=Needs(references=traits.references, answer=traits.answer, columns=list(traits.columns)),
            gives_process_rewards=traits.process_rewards,
            trainable=self.resolved.learns,
            max_request_samples=self.resolved.serve.max_batch_samples,
            max_body_bytes=self.max_body_bytes,
            call_timeout_seconds=config.timeout_seconds,
            workers=[worker.health() for worker in self.queue.workers],
        )

    async def score(self, body: bytes) -> Response:
        """The answer to a request's body."""
        try:
            request, groups = await asyncio.to_thread(_read, body)
        except ValidationError as error:
            found = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_url=False)]
            return _error(422, "; ".join(found[:SHOWN_PROBLEMS]))
        except ValueError as error:
            return _error(422, str(error))
        samples, limit = sum(len(group.samples) for group in groups), self.resolved.serve.max_batch_samples
        if samples > limit and len(groups) > 1:
            return _error(413, f"{samples} samples in one request, more than serve.max_batch_samples={limit}")
        try:
            scored = await self.queue.score(groups, request.deadline_seconds)
        except BusyError as busy:
            return _error(busy.status, str(busy), {"Retry-After": str(busy.retry_seconds)})
        return Response(await asyncio.to_thread(self._written, scored), media_type="application/json")

    def _written(self, groups: list[Group]) -> bytes:
        scores = [scores_to_wire(group) for group in groups]
        response = ScoreResponse(schema_version=SCHEMA_VERSION, model_version=self.model_version, groups=scores)
        return response.model_dump_json().encode()


def make_app(server: RewardServer) -> Any:
    """The ASGI application around a server whose queue is started."""
    app = FastAPI(title="rlkit reward", docs_url=None, redoc_url=None, openapi_url=None)

    async def score(request: Request) -> Response:
        began = time.perf_counter()
        response = await server.score(await request.body())
        server.metrics.requests.labels(str(response.status_code)).inc()
        server.metrics.request_seconds.observe(time.perf_counter() - began)
        return response

    async def health() -> Response:
        found = server.health()
        return Response(found.model_dump_json(), 200 if found.status == "ok" else 503, media_type="application/json")

    async def metrics() -> Response:
        return Response(server.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def schema() -> Response:
        messages = {"request": ScoreRequest.model_json_schema(), "response": ScoreResponse.model_json_schema()}
        return JSONResponse({"schema_version": SCHEMA_VERSION, **messages})

    app.post(SCORE_PATH, response_model=None)(score)
    app.get(HEALTH_PATH, response_model=None)(health)
    app.get(METRICS_PATH, response_model=None)(metrics)
    app.get(SCHEMA_PATH, response_model=None)(schema)
    return Guard(app, server.resolved.token, server.max_body_bytes)


def _read(body: bytes) -> tuple[ScoreRequest, list[Group]]:
    request = ScoreRequest.model_validate_json(body)
    return request, [from_wire(group) for group in request.groups]


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": message}, status, headers)


KEEP_ALIVE_SECONDS = 60


async def serve(resolved: ResolvedServe, listener: socket.socket) -> int:
    """Load the reward, serve on the bound socket until Ctrl-C or SIGTERM, end everything.

    Returns 0, or 1 if the reward cannot start (the screen says why).
    """
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
    name = resolved.reward["_target_"]
    if resolved.learns:
        print(f"rlkit: {name} learns in a run of its own; served, it stays as it is and only scores", file=sys.stderr)
    print(f"loading {name}", flush=True)
    reward = RewardServer(resolved)
    server = _Server(
        uvicorn.Config(
            make_app(reward),
            log_level="warning",
            access_log=False,
            server_header=False,
            lifespan="off",
            limit_concurrency=resolved.serve.max_connections,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=max(1, round(resolved.serve.end_seconds)),
        )
    )
    ending = _end_on_signals(server)
    try:
        starting = asyncio.ensure_future(reward.queue.start())
        await asyncio.wait({starting, ending}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()  # its processes are killed
            await asyncio.wait({starting})
        else:
            starting.result()
            listener.listen()  # who reads the next line may connect at once, before uvicorn listens
            print(f"serving {name} ({reward.model_version}) on {_address(listener)}", flush=True)
            await server.serve(sockets=[listener])
    except RewardFailed as error:
        return print_error(error)
    finally:
        await reward.queue.close()
    print("ended", flush=True)
    return 0


class _Server(uvicorn.Server):
    """Signals are handled here, also while the reward loads; uvicorn would raise them once more at its end."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _end_on_signals(server: _Server) -> asyncio.Future[None]:
    """Done at the first signal, which lets open requests finish; a second Ctrl-C does not."""
    loop = asyncio.get_running_loop()
    asked: asyncio.Future[None] = loop.create_future()

    def end() -> None:
        server.force_exit = server.should_exit
        server.should_exit = True
        if not asked.done():
            asked.set_result(None)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, end)
    return asked


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
