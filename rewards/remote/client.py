"""Groups sent to a reward server: cut into requests, some at a time, tried again with back-off, and a clear end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rewards.remote.handshake import CONNECT_SECONDS, SHOWN, transport
from rlkit.experience import Group, GroupScores, Score
from rlkit.experience.wire import (
    SCORE_PATH,
    ScoreResponse,
    UnsendableError,
    encode,
    in_chunks,
    request_body,
    scores_from_wire,
)

if TYPE_CHECKING:
    import httpx
    from tenacity import RetryCallState

log = logging.getLogger(__name__)

PASSES = (408, 425, 429, 500, 502, 503, 504)
"""Answers that say nothing about the request: try again. Other 4xx would be the same a second time."""
ABOUT_SIZE_OR_CONTENT = (400, 413, 422)
"""Answers that may be about one group of the request: it is halved to find it."""
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 5.0
"""Seconds between tries: doubled each time, drawn at random up to that."""


class _TryAgain(Exception):
    """A failure that may pass."""

    def __init__(self, message: str, pause: float = 0.0) -> None:
        super().__init__(message)
        self.pause = pause
        """Seconds that the server asks to wait."""


class _Refused(Exception):
    """The server does not take this request."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Limits:
    """How a call is cut up and when it ends."""

    samples_per_request: int
    tokens_per_request: int
    concurrent_requests: int
    body_bytes: int
    attempts: int
    budget_seconds: float


@dataclass
class _Call:
    """One call of `score`."""

    deadline: float
    room: asyncio.Semaphore
    last_problem: str = ""
    scores: dict[int, GroupScores] = field(default_factory=dict)
    """By index of the group."""


class RewardClient:
    """Asks one server. All methods run in one event loop."""

    def __init__(self, url: str, token: str | None, model_version: str, limits: Limits, send_logprobs: bool) -> None:
        self.url, self.model_version, self.limits = url.rstrip("/") + SCORE_PATH, model_version, limits
        self._token, self._send_logprobs = token, send_logprobs
        self._http: httpx.AsyncClient | None = None

    async def score(self, groups: Sequence[Group]) -> list[GroupScores]:
        """Scores of all groups, in order, within the budget; what got none by then is invalid, with the reason."""
        limits = self.limits
        loop = asyncio.get_running_loop()
        call = _Call(loop.time() + limits.budget_seconds, asyncio.Semaphore(limits.concurrent_requests))
        async with asyncio.TaskGroup() as tasks:
            for chunk in in_chunks(groups, limits.samples_per_request, limits.tokens_per_request):
                tasks.create_task(self._chunk(call, {index: groups[index] for index in chunk}))
        return [call.scores[index] for index in range(len(groups))]

    async def close(self) -> None:
        """Close the connections."""
        if self._http is not None:
            await self._http.aclose()
            self._http = None

    async def _chunk(self, call: _Call, groups: dict[int, Group]) -> None:
        bodies = {}
        for index, group in groups.items():
            try:
                bodies[index] = encode(group, self._send_logprobs)
            except (UnsendableError, ValueError) as error:
                call.scores[index] = _invalid(group, f"unsendable: {error}")
        sendable = {index: group for index, group in groups.items() if index in bodies}
        if sendable:
            async with call.room:
                await self._request(call, sendable, bodies)

    async def _request(self, call: _Call, groups: dict[int, Group], bodies: dict[int, bytes]) -> None:
        """Score these groups with one request, or with halves if the server refuses its size or content."""
        from tenacity import RetryError

        try:
            async with asyncio.timeout_at(call.deadline):
                answered = await self._tried_again(call, groups, bodies)
        except TimeoutError:
            last = f"; last: {call.last_problem}" if call.last_problem else ""
            reason = f"timeout: no scores from {self.url} within {self.limits.budget_seconds:g} s{last}"
        except RetryError:
            reason = f"unreachable: {call.last_problem} ({self.limits.attempts} tries)"
        except _Refused as refused:
            if len(groups) > 1 and refused.status in ABOUT_SIZE_OR_CONTENT:
                indices = list(groups)
                for half in (indices[: len(indices) // 2], indices[len(indices) // 2 :]):
                    await self._request(call, {index: groups[index] for index in half}, bodies)
                return
            reason = f"refused: {refused}"
        else:
            call.scores.update(answered)
            return
        call.scores.update({index: _invalid(group, reason) for index, group in groups.items()})

    async def _tried_again(
        self, call: _Call, groups: dict[int, Group], bodies: dict[int, bytes]
    ) -> dict[int, GroupScores]:
        """Raises tenacity.RetryError after the last try, _Refused at once."""
        from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

        backoff = wait_random_exponential(multiplier=FIRST_PAUSE, max=LONGEST_PAUSE)

        def pause(state: RetryCallState) -> float:
            problem = state.outcome.exception() if state.outcome else None
            asked = problem.pause if isinstance(problem, _TryAgain) else 0.0
            return max(asked, backoff(state))

        def note(state: RetryCallState) -> None:
            log.warning("%s; try %d of %d", call.last_problem, state.attempt_number + 1, self.limits.attempts)

        async for attempt in AsyncRetrying(
            retry=retry_if_exception_type(_TryAgain),
            stop=stop_after_attempt(self.limits.attempts),
            wait=pause,
            before_sleep=note,
        ):
            with attempt:
                try:
                    return await self._once(call, groups, bodies)
                except _TryAgain as problem:
                    call.last_problem = str(problem)
                    raise
        raise AssertionError("tenacity ended without a result")

    async def _once(self, call: _Call, groups: dict[int, Group], bodies: dict[int, bytes]) -> dict[int, GroupScores]:
        import httpx

        remaining = call.deadline - asyncio.get_running_loop().time()
        body = request_body([bodies[index] for index in groups], remaining)
        if len(body) > self.limits.body_bytes:
            raise _Refused(f"{len(body)} bytes, more than the server's serve.max_body_mib allows", 413)
        headers = {"Content-Type": "application/json"}
        try:
            answer = await self._connection().post(self.url, content=body, headers=headers)
        except httpx.HTTPError as error:
            raise _TryAgain(f"{self.url}: {type(error).__name__}: {error}") from error
        said = f"{self.url}: HTTP {answer.status_code}: {answer.text[:SHOWN]}"
        if answer.status_code in PASSES:
            raise _TryAgain(said, _seconds(answer.headers.get("Retry-After")))
        if answer.status_code != 200:
            raise _Refused(said, answer.status_code)
        return self._read(groups, answer.content)

    def _read(self, groups: dict[int, Group], content: bytes) -> dict[int, GroupScores]:
        """The scores of an answer; invalid ones if it does not keep to its schema or comes from another model."""
        try:
            response = ScoreResponse.model_validate_json(content)
            if [scores.id for scores in response.groups] != [group.id for group in groups.values()]:
                raise ValueError("it answers for other groups than it was sent")
            scores = [scores_from_wire(scores) for scores in response.groups]
        except ValueError as error:
            reason = f"wrong_answer: {self.url}: {error}"
            return {index: _invalid(group, reason) for index, group in groups.items()}
        if response.model_version != self.model_version:
            reason = (
                f"model_changed: {self.url} now serves {response.model_version}, this run began with "
                f"{self.model_version}; its scores are on another scale"
            )
            return {index: _invalid(group, reason) for index, group in groups.items()}
        return dict(zip(groups, scores, strict=True))

    def _connection(self) -> httpx.AsyncClient:
        if self._http is None:
            import httpx

            # No read time-out of its own: the call's deadline ends a request.
            timeout = httpx.Timeout(None, connect=CONNECT_SECONDS)
            self._http = httpx.AsyncClient(timeout=timeout, **transport(self._token))
        return self._http


def _invalid(group: Group, reason: str) -> GroupScores:
    return GroupScores((Score.invalid(reason),) * len(group.samples))


def _seconds(retry_after: str | None) -> float:
    """What a server asks for, at most the longest pause; 0 for a date or nothing."""
    try:
        return min(float(retry_after or 0), LONGEST_PAUSE)
    except ValueError:
        return 0.0
