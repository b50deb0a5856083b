"""The HTTP client of the rewards that ask a server.

`TransientError` is retried: no connection, no answer in time, a broken body, 408, 425, 429 and 5xx (except 501 and
505). `RefusedError` is raised at once, because it would recur.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import math
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import httpx
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

log = logging.getLogger(__name__)

T = TypeVar("T")
Body = bytes | Callable[[float], bytes]
"""The content, or a function of the seconds until the deadline that builds it for each try (its errors propagate)."""

SHOWN_CHARACTERS = 300
SAME_AGAIN = (501, 505)


class HttpError(Exception):
    def __init__(self, url: str, problem: str, status: int | None = None, answer: str = "") -> None:
        super().__init__(f"{url}: {problem}")
        self.url = url
        self.problem = problem
        """The problem without the address: `ConnectError: ...`, `HTTP 503: ...`, `no answer within 30 s`."""
        self.status = status
        self.answer = answer
        self.retry_after: float | None = None
        """Seconds that the server asks the client to wait."""


class TransientError(HttpError):
    """`post` raises it after the last try; `read` may raise it for another try."""

    timed_out: bool = False
    tries: int = 1


class RefusedError(HttpError): ...


class OutOfTimeError(HttpError):
    """The deadline would pass before an answer or the next try."""

    def __init__(self, url: str, last: TransientError | None) -> None:
        super().__init__(url, "out of time" + (f"; last: {last}" if last else ""))
        self.last = last
        """Last error of this request, or of a concurrent one since this one began."""


@dataclass(frozen=True, slots=True)
class Limits:
    attempts: int | None = None
    """None: until the deadline."""
    try_seconds: float | None = None
    """Limit of one try, from connecting to the last byte; None: until the deadline."""
    connect_seconds: float | None = None
    concurrent: int = 8
    """Requests in flight, not counting those that wait for the next try."""
    first_pause: float = 0.5
    longest_pause: float = 30.0
    """In seconds. Pauses are random, up to a bound that doubles each time."""
    longest_retry_after: float | None = None
    """Cap on the server's Retry-After; None: `longest_pause`."""


class HttpClient:
    """Posts to one service, at one address or at replicas in turn. Used from one event loop."""

    def __init__(
        self,
        urls: Sequence[str],
        limits: Limits,
        token: str | None = None,
        *,
        trust_env: bool = True,
        verify: ssl.SSLContext | bool = True,
        log_retries: bool = False,
    ) -> None:
        """`trust_env` and `verify` are httpx's options. `log_retries`: warn about retried failures."""
        self.limits = limits
        self._urls, self._turns = tuple(urls), itertools.cycle(urls)
        self._log_retries = log_retries
        self._slots = asyncio.Semaphore(limits.concurrent)
        self._latest: TransientError | None = None
        self._http = httpx.AsyncClient(
            headers={"Content-Type": "application/json", **_bearer(token)},
            timeout=httpx.Timeout(None, connect=limits.connect_seconds),
            limits=httpx.Limits(max_connections=limits.concurrent),
            trust_env=trust_env,
            verify=verify,
        )

    async def post(self, body: Body, deadline: float, read: Callable[[httpx.Response], T]) -> T:
        """Return `read(answer)` of an answer with status 200; `deadline` is on `time.monotonic`.

        Raise TransientError after the last try, RefusedError, OutOfTimeError, and what `body` and `read` raise.
        """
        before = self._latest

        def stop(state: RetryCallState) -> bool:
            limit = self.limits.attempts
            return limit == state.attempt_number or time.monotonic() + state.upcoming_sleep >= deadline

        retrying = AsyncRetrying(
            retry=retry_if_exception_type(TransientError),
            after=self._note,
            wait=self._pause,
            stop=stop,
            before_sleep=self._warn if self._log_retries else None,
            reraise=True,
        )
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                answer: T = await retrying(self._try, body, deadline, read)
                return answer
        except TransientError as error:
            if error.tries == self.limits.attempts:
                raise
            raise OutOfTimeError(error.url, error) from error
        except TimeoutError:
            last = self._latest if self._latest is not before else None
            raise OutOfTimeError(", ".join(self._urls), last) from None

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _try(self, body: Body, deadline: float, read: Callable[[httpx.Response], T]) -> T:
        async with self._slots:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError
            answer = await self._send(next(self._turns), body if isinstance(body, bytes) else body(remaining))
        return read(require_ok(answer))

    async def _send(self, url: str, content: bytes) -> httpx.Response:
        limit = self.limits.try_seconds
        try:
            async with asyncio.timeout(limit):  # httpx's own limits restart with every byte
                return await self._http.post(url, content=content)
        except TimeoutError:
            error = TransientError(url, f"no answer within {limit:g} s")
            error.timed_out = True
            raise error from None
        except httpx.RequestError as error:  # includes DecodingError, for a body that is not valid gzip
            raise _no_answer(url, error) from error

    def _note(self, state: RetryCallState) -> None:
        self._latest = error = _failure(state)
        error.tries = state.attempt_number

    def _pause(self, state: RetryCallState) -> float:
        limits = self.limits
        longest = limits.longest_pause if limits.longest_retry_after is None else limits.longest_retry_after
        pause = wait_random_exponential(multiplier=limits.first_pause, max=limits.longest_pause)(state)
        return max(pause, min(_failure(state).retry_after or 0.0, longest))

    def _warn(self, state: RetryCallState) -> None:
        of = f" of {self.limits.attempts}" if self.limits.attempts else ""
        log.warning("%s; try %d%s", _failure(state), state.attempt_number + 1, of)


class BlockingHttpClient:
    """HttpClient for threads; its event loop runs in a separate thread."""

    def __init__(self, urls: Sequence[str], limits: Limits, token: str | None = None, **options: Any) -> None:
        self._client = HttpClient(urls, limits, token, **options)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="http", daemon=True)
        self._thread.start()

    def post(self, body: Body, deadline: float, read: Callable[[httpx.Response], T]) -> T:
        """`body` and `read` run in the loop's thread."""
        return asyncio.run_coroutine_threadsafe(self._client.post(body, deadline, read), self._loop).result()

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._client.close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def get(
    url: str,
    seconds: float,
    token: str | None = None,
    *,
    connect_seconds: float | None = None,
    trust_env: bool = True,
    verify: ssl.SSLContext | bool = True,
) -> httpx.Response:
    """Send one GET request; any status counts as an answer. Raise TransientError if there is none."""
    timeout = httpx.Timeout(seconds, connect=connect_seconds or seconds)
    try:
        return httpx.get(url, headers=_bearer(token), timeout=timeout, trust_env=trust_env, verify=verify)
    except httpx.RequestError as error:
        raise _no_answer(url, error) from error


def _bearer(token: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"} if token else {}


def json_body(value: Any) -> bytes:
    """Encode as ASCII, because a model's text may contain characters that UTF-8 cannot encode."""
    return json.dumps(value).encode()


def require_ok(answer: httpx.Response) -> httpx.Response:
    """Return an answer with status 200; raise TransientError or RefusedError for any other status."""
    status = answer.status_code
    if status == 200:
        return answer
    passes = status in (408, 425, 429) or (status >= 500 and status not in SAME_AGAIN)
    shown = excerpt(answer)
    error = (TransientError if passes else RefusedError)(str(answer.url), f"HTTP {status}: {shown}", status, shown)
    error.retry_after = _retry_after(answer)
    raise error


def excerpt(answer: httpx.Response) -> str:
    return answer.text[:SHOWN_CHARACTERS]


def _no_answer(url: str, error: httpx.RequestError) -> TransientError:
    return TransientError(url, f"{type(error).__name__}: {error}")


def _failure(state: RetryCallState) -> TransientError:
    error = state.outcome and state.outcome.exception()
    assert isinstance(error, TransientError)
    return error


def _retry_after(answer: httpx.Response) -> float | None:
    try:
        seconds = float(answer.headers.get("Retry-After", ""))
    except ValueError:
        return None
    return None if math.isnan(seconds) else max(0.0, seconds)
