"""Calls to an OpenAI-compatible chat endpoint: bounded in time, number and concurrency, retried where that can help."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt, wait_random_exponential

LONGEST_PAUSE_SECONDS = 30.0
"""Between tries, where the server does not say how long to wait."""
SHOWN_CHARACTERS = 200


class CallFailed(Exception):
    """No answer; the message is the reason for the samples (`class: details`)."""


class _Transient(CallFailed):
    """Another try may succeed."""

    def __init__(self, reason: str, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


@dataclass
class Budget:
    """What may be spent, and what was."""

    max_calls: int | None
    max_tokens: int | None
    calls: int = 0
    tokens: int = 0

    def take_call(self) -> None:
        """Count a call that is about to be made. Raises CallFailed if nothing is left."""
        if self.max_calls is not None and self.calls >= self.max_calls:
            raise CallFailed(f"budget: all {self.max_calls} calls are made (reward.max_calls)")
        if self.max_tokens is not None and self.tokens >= self.max_tokens:
            raise CallFailed(f"budget: {self.tokens} of {self.max_tokens} tokens are used (reward.max_tokens)")
        self.calls += 1

    def count(self, usage: Any) -> None:
        """Count the tokens of an answer. Raises CallFailed if there is a limit and the server does not tell them."""
        tokens = usage.get("total_tokens") if isinstance(usage, Mapping) else None
        if isinstance(tokens, int):
            self.tokens += tokens
        elif self.max_tokens is not None:
            raise CallFailed("budget: the server does not tell its usage; limit reward.max_calls instead")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where to call, and how often."""

    base_url: str
    model: str
    api_key: str | None
    fields: Mapping[str, Any]
    """Further fields of the request."""
    call_timeout_seconds: float
    attempts: int
    max_concurrent: int


class ChatClient:
    """Used from one event loop. A call that fails for good raises CallFailed."""

    def __init__(self, endpoint: Endpoint, budget: Budget) -> None:
        self._endpoint, self.budget = endpoint, budget
        key = endpoint.api_key
        self._http = httpx.AsyncClient(
            headers={"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})},
            timeout=endpoint.call_timeout_seconds,
            limits=httpx.Limits(max_connections=endpoint.max_concurrent),
        )
        self._slots = asyncio.Semaphore(endpoint.max_concurrent)

    async def answer(self, messages: Sequence[Mapping[str, str]], form: Mapping[str, Any], deadline: float) -> str:
        """The text of the answer. `form` is further fields of this request; `deadline` is on `time.monotonic`."""

        def hopeless(state: RetryCallState) -> bool:
            return time.monotonic() + state.upcoming_sleep >= deadline

        retrying = AsyncRetrying(
            retry=retry_if_exception_type(_Transient),
            stop=lambda state: stop_after_attempt(self._endpoint.attempts)(state) or hopeless(state),
            wait=_pause,
            reraise=True,
        )
        body = {"model": self._endpoint.model, "messages": list(messages), **self._endpoint.fields, **form}
        body = {name: value for name, value in body.items() if value is not None}
        try:
            async with asyncio.timeout(deadline - time.monotonic()):  # whatever the tries do, this ends
                found: str = await retrying(self._once, body, deadline)
        except TimeoutError:
            raise CallFailed("timeout: the scoring call's time was over before the judge answered") from None
        return found

    async def close(self) -> None:
        await self._http.aclose()

    async def _once(self, body: Mapping[str, Any], deadline: float) -> str:
        async with self._slots:
            seconds = min(self._endpoint.call_timeout_seconds, deadline - time.monotonic())
            if seconds <= 0:
                raise CallFailed("timeout: the scoring call's time was over before this question's turn came")
            self.budget.take_call()
            response = await self._post(body, seconds)
        return self._text(response)

    async def _post(self, body: Mapping[str, Any], seconds: float) -> httpx.Response:
        try:
            async with asyncio.timeout(seconds):  # httpx's own time-outs are for each read
                # ASCII, because a response may hold what UTF-8 cannot encode
                return await self._http.post(f"{self._endpoint.base_url}/chat/completions", content=json.dumps(body))
        except TimeoutError:
            raise _Transient(f"timeout: the judge gave no answer in {seconds:.3g} s") from None
        except httpx.TimeoutException as error:
            raise _Transient(f"timeout: {type(error).__name__}") from error
        except httpx.RequestError as error:  # with DecodingError: a body that is not the gzip it says
            raise _Transient(f"unavailable: {type(error).__name__}: {error}") from error

    def _text(self, response: httpx.Response) -> str:
        status = response.status_code
        if status == 429 or status == 408 or status >= 500:
            kind = "rate_limited" if status == 429 else "unavailable"
            raise _Transient(f"{kind}: the judge answered {status}: {_shown(response)}", _retry_after(response))
        if status != 200:
            raise CallFailed(f"refused: the judge answered {status}: {_shown(response)}")
        try:
            found = response.json()
            choice = found["choices"][0]
            text = choice["message"].get("content")
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:  # no JSON, or another
            raise _Transient(
                f"bad_response: no chat completion ({type(error).__name__}): {_shown(response)}"
            ) from error
        self.budget.count(found.get("usage"))
        return text if isinstance(text, str) else ""


def _pause(state: RetryCallState) -> float:
    """Seconds until the next try: what the server asks for, else exponential with jitter."""
    error = state.outcome.exception() if state.outcome is not None else None
    if isinstance(error, _Transient) and error.retry_after is not None:
        return error.retry_after
    return wait_random_exponential(multiplier=0.5, max=LONGEST_PAUSE_SECONDS)(state)


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds in the Retry-After header; a date there is rare and ignored."""
    try:
        seconds = float(response.headers.get("retry-after", ""))
    except ValueError:
        return None
    return max(0.0, seconds) if seconds == seconds else None


def _shown(response: httpx.Response) -> str:
    return " ".join(response.text[:SHOWN_CHARACTERS].split())
