"""The HTTP face of a served reward: POST /v1/score, GET /health, /metrics and /v1/schema."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import ValidationError

import rlkit
from rewards.base import RewardContext
from rewards.remote.wire import (
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
from rlkit.experience import Group
from rlkit.serving.http_config import ResolvedServe
from rlkit.serving.http_guard import Guard
from rlkit.serving.http_metrics import ServerMetrics
from rlkit.serving.http_process import RewardProcess
from rlkit.serving.http_queue import BatchLimits, BusyError, ScoringQueue
from rlkit.serving.http_selftest import model_version

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
        needs = cls.needs(config)
        return Health(
            status="ok" if any(worker.usable for worker in self.queue.workers) else "down",
            schema_version=SCHEMA_VERSION,
            rlkit_version=rlkit.__version__,
            reward=self.resolved.reward["_target_"],
            model_version=self.model_version,
            needs=Needs(references=needs.references, answer=needs.answer, columns=list(needs.columns)),
            gives_process_rewards=cls.gives_process_rewards(config),
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
