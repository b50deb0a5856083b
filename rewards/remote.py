"""`reward=remote`: a reward served by `python -m rlkit.serve reward=...`, on this or another machine."""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import httpx
from pydantic import Field

from rewards.base import Reward, RewardConfig, RewardContext, RewardTraits
from rewards.services.http import HttpClient, Limits, OutOfTimeError, RefusedError, TransientError, excerpt, get
from rlkit.experience import Group, GroupScores, Score, UserError
from rlkit.experience.section import Deadline
from rlkit.experience.wire import (
    HEALTH_PATH,
    SCHEMA_VERSION,
    SCORE_PATH,
    Health,
    ScoreResponse,
    encode,
    in_chunks,
    request_body,
    scores_from_wire,
)

log = logging.getLogger(__name__)

BUDGET_SHARE = 0.8
"""The client gives up after this share of a call's deadline, before it is killed."""
SERVER_TRIES = 2
"""A server retries a request once if its process fails, each time up to its deadline."""
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 5.0
"""In seconds. Pauses are random, up to a bound that doubles each time."""
START_PAUSE = 0.5
"""Seconds between checks for a server that is not up yet."""
CONNECT_SECONDS = 5.0
HEALTH_SECONDS = 10.0
REMEMBERED_SECONDS = 10.0
"""Long enough for one health check to serve all checks of a configuration."""
ABOUT_SIZE_OR_CONTENT = (400, 413, 422)
"""HTTP status codes of refusals that one group of the request may have caused."""


class RemoteReward(Reward):
    """Sends groups to a reward server and returns its scores.

    If the server is lost, the client retries with back-off until the call's deadline; then the samples are invalid.
    """

    class Config(RewardConfig):
        url: str
        """Address of the server: http://HOST:PORT."""
        timeout_seconds: Deadline = 360.0
        """Deadline of one scoring call; the client gives up after 80 % of it. The default leaves time for two tries
        by a server with its default deadline (120 s)."""
        token_env: str | None = None
        """Environment variable that holds the server's token."""
        samples_per_request: int = Field(default=64, ge=1)
        """Whole groups are sent together up to this many samples (fewer if the server takes fewer)."""
        tokens_per_request: int = Field(default=65536, ge=1)
        """Limit of tokens per request, in addition to `samples_per_request`; each prompt counts once."""
        concurrent_requests: int = Field(default=4, ge=1)
        """Concurrent requests of each worker."""
        attempts: int = Field(default=20, ge=1)
        """Tries per request, with growing pauses, within `timeout_seconds`."""
        send_logprobs: bool = False
        """Send the sampler's log-probs; otherwise the served reward sees NaN."""

    def __init__(self, config: Any, context: RewardContext) -> None:
        super().__init__(config, context)
        self._client: _Client | None = None
        self._runner: asyncio.Runner | None = None

    @classmethod
    def check(cls, config: Any) -> list[str]:
        try:
            _health_once(config)
        except HandshakeError as error:
            return [str(error)]
        return []

    @classmethod
    def traits(cls, config: Any) -> RewardTraits:
        """Return the served reward's traits, without its GPU; the defaults if the server does not answer."""
        try:
            health = _health_once(config)
        except HandshakeError:  # `check` reports it
            return RewardTraits(uses_gpu=False)
        return RewardTraits(**dict(health.traits), uses_gpu=False)

    def start(self) -> None:
        """Connect to the server; raise HandshakeError if there is none within a call's deadline."""
        config, budget = self.config, BUDGET_SHARE * self.config.timeout_seconds
        token = _token(config.token_env)
        health = _wait_for_server(config.url, token, time.monotonic() + budget)
        if health.trainable:
            log.warning(
                "%s can learn, but not on a server: here it only scores, with the weights it was started with",
                health.reward,
            )
        longest = SERVER_TRIES * health.call_timeout_seconds
        if budget < longest:
            log.warning(
                "reward.timeout_seconds=%g: this client gives up after %g s, but the server at %s may work on a "
                "request for %g s (%d tries of %g s each); set at least %g here, or start the server with less",
                *(config.timeout_seconds, budget, config.url, longest, SERVER_TRIES, health.call_timeout_seconds),
                longest / BUDGET_SHARE,
            )
        self._client = _Client(config, token, health, budget)
        self._runner = asyncio.Runner()  # one event loop for all calls keeps the connections open

    def score(self, groups: Sequence[Group]) -> list[GroupScores]:
        if self._client is None or self._runner is None:
            raise RuntimeError("start() was not called")
        return self._runner.run(self._client.score(groups)) if groups else []

    def close(self) -> None:
        if self._client is not None and self._runner is not None:
            self._runner.run(self._client.http.close())
            self._runner.close()
        self._client = self._runner = None


class _Client:
    """Used from one event loop."""

    def __init__(self, config: RemoteReward.Config, token: str | None, health: Health, budget_seconds: float) -> None:
        self._config, self._health, self._budget_seconds = config, health, budget_seconds
        self._url = config.url.rstrip("/") + SCORE_PATH
        limits = Limits(
            attempts=config.attempts,
            connect_seconds=CONNECT_SECONDS,
            concurrent=config.concurrent_requests,
            first_pause=FIRST_PAUSE,
            longest_pause=LONGEST_PAUSE,
        )
        self.http = HttpClient([self._url], limits, token, **_transport(), log_retries=True)

    async def score(self, groups: Sequence[Group]) -> list[GroupScores]:
        deadline = time.monotonic() + self._budget_seconds
        scores: dict[int, GroupScores] = {}
        bodies: dict[int, bytes] = {}
        for index, group in enumerate(groups):
            try:
                bodies[index] = encode(group, self._config.send_logprobs)
            except ValueError as error:
                scores[index] = _invalid(group, f"unsendable: {error}")
        samples = min(self._config.samples_per_request, self._health.max_request_samples)
        async with asyncio.TaskGroup() as tasks:
            requests = []
            for chunk in in_chunks(groups, samples, self._config.tokens_per_request):
                sendable = {index: groups[index] for index in chunk if index in bodies}
                if sendable:
                    requests.append(tasks.create_task(self._request(sendable, bodies, deadline)))
        for request in requests:
            scores |= request.result()
        return [scores[index] for index in range(len(groups))]

    async def _request(
        self, groups: dict[int, Group], bodies: dict[int, bytes], deadline: float
    ) -> dict[int, GroupScores]:
        """Send one request, or its two halves if the server refuses its size or content."""

        def body(remaining_seconds: float) -> bytes:
            content = request_body([bodies[index] for index in groups], remaining_seconds)
            if len(content) > self._health.max_body_bytes:
                problem = f"{len(content)} bytes, more than the server's serve.max_body_mib allows"
                raise RefusedError(self._url, problem, 413)
            return content

        try:
            return await self.http.post(body, deadline, lambda answer: self._read(groups, answer.content))
        except OutOfTimeError as error:
            last = f"; last: {error.last}" if error.last else ""
            reason = f"timeout: no scores from {self._url} within {self._budget_seconds:g} s{last}"
        except TransientError as error:
            reason = f"unreachable: {error} ({error.tries} tries)"
        except RefusedError as error:
            if len(groups) > 1 and error.status in ABOUT_SIZE_OR_CONTENT:
                indices, half = list(groups), len(groups) // 2
                first = await self._request({index: groups[index] for index in indices[:half]}, bodies, deadline)
                second = await self._request({index: groups[index] for index in indices[half:]}, bodies, deadline)
                return first | second
            reason = f"refused: {error}"
        return {index: _invalid(group, reason) for index, group in groups.items()}

    def _read(self, groups: dict[int, Group], content: bytes) -> dict[int, GroupScores]:
        try:
            response = ScoreResponse.model_validate_json(content)
            if [scores.id for scores in response.groups] != [group.id for group in groups.values()]:
                raise ValueError("it answered for groups other than those it was sent")
            scores = [scores_from_wire(scores) for scores in response.groups]
        except ValueError as error:
            reason = f"wrong_answer: {self._url}: {error}"
        else:
            if response.model_version == self._health.model_version:
                return dict(zip(groups, scores, strict=True))
            reason = (
                f"model_changed: {self._url} now serves {response.model_version}, this run started with "
                f"{self._health.model_version}; its scores are on another scale"
            )
        return {index: _invalid(group, reason) for index, group in groups.items()}


def _invalid(group: Group, reason: str) -> GroupScores:
    return GroupScores((Score.invalid(reason),) * len(group.samples))


class HandshakeError(UserError):
    def __init__(self, message: str, may_pass: bool = False) -> None:
        super().__init__(message)
        self.may_pass = may_pass


_remembered: dict[tuple[str, str | None], tuple[float, Health | HandshakeError]] = {}


def _health_once(config: Any) -> Health:
    """Return the server's health, cached for a few seconds. Raise HandshakeError."""
    problem = _url_problem(config.url)
    if problem:
        raise HandshakeError(problem)
    token = _token(config.token_env)
    asked, outcome = _remembered.get((config.url, token), (0.0, None))
    if outcome is None or time.monotonic() - asked >= REMEMBERED_SECONDS:
        try:
            outcome = _ask_health(config.url, token)
        except HandshakeError as error:
            outcome = error
        _remembered[config.url, token] = (time.monotonic(), outcome)
    if isinstance(outcome, HandshakeError):
        raise outcome
    return outcome


def _wait_for_server(url: str, token: str | None, deadline: float) -> Health:
    """Wait until the server is up; raise HandshakeError at the deadline, or at once for a permanent problem."""
    while True:
        try:
            return _ask_health(url, token)
        except HandshakeError as error:
            if not error.may_pass or time.monotonic() + START_PAUSE > deadline:
                raise
            log.warning("%s; looking again", error)
            time.sleep(START_PAUSE)


def _url_problem(url: str) -> str | None:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return f"reward.url={url}: must be http://HOST:PORT or https://HOST:PORT"
    if parts.username or parts.password or parts.query or parts.fragment:
        return "reward.url: must be only an address; put the secret in the variable that reward.token_env names"
    return None


def _token(variable: str | None) -> str | None:
    """Read the token from the environment; raise HandshakeError if the variable is not set."""
    if variable is None:
        return None
    token = os.environ.get(variable, "").strip()
    if not token:
        raise HandshakeError(
            f"reward.token_env={variable}: the environment of this process has no {variable}; "
            f"`export {variable}=...` before the start (and, for a Ray that runs already, on its machines)"
        )
    return token


def _transport() -> dict[str, Any]:
    return {"trust_env": False, "verify": ssl.create_default_context()}


def _ask_health(url: str, token: str | None) -> Health:
    address = url.rstrip("/") + HEALTH_PATH
    try:
        answer = get(address, HEALTH_SECONDS, token, connect_seconds=CONNECT_SECONDS, **_transport())
    except TransientError as error:
        raise HandshakeError(
            f"reward.url={url}: no reward server answers there ({error.problem}); start one with "
            "`python -m rlkit.serve reward=...`",
            may_pass=True,
        ) from error
    return _read_health(url, answer)


def _read_health(url: str, answer: httpx.Response) -> Health:
    if answer.status_code == 401:
        raise HandshakeError(
            f"reward.url={url}: the server needs a token, and has not been sent the right one; name the environment "
            "variable that holds it with reward.token_env=VARIABLE"
        )
    no_reward_server = f"reward.url={url}: this is no reward server (HTTP {answer.status_code}: {excerpt(answer)})"
    if answer.status_code not in (200, 503):
        raise HandshakeError(no_reward_server, answer.status_code >= 500)
    try:
        content = answer.json()
        version = content["schema_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise HandshakeError(no_reward_server, answer.status_code == 503) from error
    if version != SCHEMA_VERSION:
        raise HandshakeError(
            f"reward.url={url}: the server (rlkit {content.get('rlkit_version')}) speaks version {version} of the "
            f"messages, this client {SCHEMA_VERSION}; install the same rlkit on both sides"
        )
    try:
        health = Health.model_validate_json(answer.content)
    except ValueError as error:
        raise HandshakeError(f"reward.url={url}: /health does not match its schema: {error}") from error
    if health.status != "ok":
        raise HandshakeError(f"reward.url={url}: the served reward {health.reward} is down; see its log", may_pass=True)
    return health
