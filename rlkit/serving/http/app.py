"""HTTP interface of a served reward: access control, POST /v1/score, GET /health, /metrics and /v1/schema."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from rlkit.config.access import host_name, is_loopback, same_token
from rlkit.experience import Group, GroupScores
from rlkit.experience.wire import (
    HEALTH_PATH,
    METRICS_PATH,
    SCHEMA_PATH,
    SCHEMA_VERSION,
    SCORE_PATH,
    Health,
    ScoreRequest,
    ScoreResponse,
    from_wire,
    scores_to_wire,
)
from rlkit.serving.http.queue import BusyError, ScoringQueue

SHOWN_PROBLEMS = 5
CLOSE = {"Connection": "close"}
"""For answers sent before the whole body was read: the rest is not read."""


class Access:
    """Requires a request to carry the token or, if there is none, to be addressed to this machine."""

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self._app, self._token = app, token
        self._bearer = HTTPBearer(auto_error=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = await self._refusal(Request(scope)) if scope["type"] == "http" else None
        await (refusal or self._app)(scope, receive, send)

    async def _refusal(self, request: Request) -> Response | None:
        if self._token is None:
            if is_loopback(host_name(request.headers.get("host", ""))):
                return None
            # Otherwise a web page whose name was made to point at 127.0.0.1 could send requests from a browser.
            return _error(403, "without a token this server answers only to localhost and loopback addresses", CLOSE)
        credentials = await self._bearer(request)
        if credentials and same_token(credentials.credentials, self._token):
            return None
        headers = {"WWW-Authenticate": "Bearer", **CLOSE}
        return _error(401, "this server requires its token: Authorization: Bearer ...", headers)


def make_app(queue: ScoringQueue, description: Health, token: str | None) -> ASGIApp:
    """Return the web application. `description`: the constant part of /health."""

    async def score(request: Request) -> Response:
        began = time.perf_counter()
        response = await _score(queue, description, await _body(request, description.max_body_bytes))
        queue.metrics.requests.labels(str(response.status_code)).inc()
        queue.metrics.request_seconds.observe(time.perf_counter() - began)
        return response

    async def health() -> Response:
        up = any(worker.usable for worker in queue.workers)  # if none could start, the next request tries again
        workers = [worker.health() for worker in queue.workers]
        now = description.model_copy(update={"status": "ok" if up else "down", "workers": workers})
        return Response(now.model_dump_json(), 200 if up else 503, media_type="application/json")

    async def metrics() -> Response:
        return Response(queue.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def schema() -> Response:
        messages = {"request": ScoreRequest.model_json_schema(), "response": ScoreResponse.model_json_schema()}
        return JSONResponse({"schema_version": SCHEMA_VERSION, **messages})

    async def refuse(request: Request, error: HTTPException) -> Response:
        return _error(error.status_code, error.detail, {**CLOSE, **(error.headers or {})})

    app = FastAPI(title="rlkit reward", docs_url=None, redoc_url=None, openapi_url=None)
    app.post(SCORE_PATH)(score)
    app.get(HEALTH_PATH)(health)
    app.get(METRICS_PATH)(metrics)
    app.get(SCHEMA_PATH)(schema)
    app.exception_handler(HTTPException)(refuse)
    return Access(app, token)


async def _body(request: Request, limit: int) -> bytes:
    """Read the body. Raises HTTPException before reading more than `limit` bytes."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "this server accepts only application/json")
    body, length = bytearray(), request.headers.get("content-length", "0")
    too_large = f"a request may have at most {limit} bytes (serve.max_body_mib); send fewer groups at once"
    if not (length.isascii() and length.isdigit()) or int(length) > limit:
        raise HTTPException(413, too_large)
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:  # sent without Content-Length
            raise HTTPException(413, too_large)
    return bytes(body)


async def _score(queue: ScoringQueue, description: Health, body: bytes) -> Response:
    try:
        request, groups = await asyncio.to_thread(_read, body)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_url=False)]
        return _error(422, "; ".join(problems[:SHOWN_PROBLEMS]))
    except ValueError as error:
        return _error(422, str(error))
    samples, limit = sum(len(group.samples) for group in groups), description.max_request_samples
    if samples > limit and len(groups) > 1:
        return _error(413, f"{samples} samples in one request, more than serve.max_batch_samples={limit}")
    try:
        scored = await queue.score(groups, request.deadline_seconds)
    except BusyError as busy:
        return _error(busy.status, str(busy), {"Retry-After": str(busy.retry_seconds)})
    content = await asyncio.to_thread(_write, groups, scored, description.model_version)
    return Response(content, media_type="application/json")


def _read(body: bytes) -> tuple[ScoreRequest, list[Group]]:
    request = ScoreRequest.model_validate_json(body)
    return request, [from_wire(group) for group in request.groups]


def _write(groups: list[Group], judged: list[GroupScores], model_version: str) -> bytes:
    scores = [scores_to_wire(group.id, own) for group, own in zip(groups, judged, strict=True)]
    response = ScoreResponse(schema_version=SCHEMA_VERSION, model_version=model_version, groups=scores)
    return response.model_dump_json().encode()


def _error(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    return JSONResponse({"error": message}, status, headers)
