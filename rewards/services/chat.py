"""A client of OpenAI-compatible chat endpoints, with a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from rewards.services.http import (
    HttpClient,
    HttpError,
    Limits,
    OutOfTimeError,
    RefusedError,
    TransientError,
    excerpt,
    json_body,
)


class CallFailed(Exception):
    """A call failed; the message becomes the samples' reason (`class: details`)."""


@dataclass
class Budget:
    max_calls: int | None
    max_tokens: int | None
    calls: int = 0
    tokens: int = 0

    def take_call(self) -> None:
        """Count a call before it is sent; raise CallFailed if nothing is left."""
        if self.max_calls is not None and self.calls >= self.max_calls:
            raise CallFailed(f"budget: all {self.max_calls} calls have been made (reward.max_calls)")
        if self.max_tokens is not None and self.tokens >= self.max_tokens:
            raise CallFailed(f"budget: {self.tokens} of {self.max_tokens} tokens have been used (reward.max_tokens)")
        self.calls += 1

    def count(self, usage: Any) -> None:
        """Count an answer's tokens; raise CallFailed if they are limited and the server does not report them."""
        tokens = usage.get("total_tokens") if isinstance(usage, Mapping) else None
        if isinstance(tokens, int):
            self.tokens += tokens
        elif self.max_tokens is not None:
            raise CallFailed("budget: the server does not report its usage; limit reward.max_calls instead")


@dataclass(frozen=True, slots=True)
class Endpoint:
    base_url: str
    """Without `/chat/completions`."""
    model: str
    api_key: str | None
    fields: Mapping[str, Any]
    """Extra fields of every request; None removes one."""
    limits: Limits


class ChatClient:
    """Used from one event loop."""

    def __init__(self, endpoint: Endpoint, budget: Budget) -> None:
        self.endpoint, self.budget = endpoint, budget
        self._http = HttpClient([f"{endpoint.base_url}/chat/completions"], endpoint.limits, endpoint.api_key)

    async def answer(self, messages: Sequence[Mapping[str, str]], fields: Mapping[str, Any], deadline: float) -> str:
        """Return the answer's text; raise CallFailed. `deadline` is on `time.monotonic`."""
        request = {"model": self.endpoint.model, "messages": list(messages), **self.endpoint.fields, **fields}
        content = json_body({name: value for name, value in request.items() if value is not None})

        def paid(_: float) -> bytes:
            self.budget.take_call()
            return content

        try:
            return await self._http.post(paid, deadline, self._text)
        except HttpError as error:
            raise CallFailed(_reason(error)) from error

    async def close(self) -> None:
        await self._http.close()

    def _text(self, response: httpx.Response) -> str:
        try:
            answer = response.json()
            text = answer["choices"][0]["message"].get("content")
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:  # not such JSON
            problem = f"no chat completion ({type(error).__name__}): {excerpt(response)}"
            raise TransientError(str(response.url), problem, response.status_code) from error
        self.budget.count(answer.get("usage"))
        return text if isinstance(text, str) else ""


def _reason(error: HttpError) -> str:
    if isinstance(error, OutOfTimeError):
        late = "timeout: the scoring call's time ran out before the judge answered"
        return _reason(error.last) if error.last else late
    if isinstance(error, TransientError) and error.timed_out:
        return f"timeout: the judge gave {error.problem}"
    if error.status is None:
        return f"unavailable: {error.problem}"
    if error.status == 200:
        return f"bad_response: {' '.join(error.problem.split())}"
    kind = "refused" if isinstance(error, RefusedError) else "rate_limited" if error.status == 429 else "unavailable"
    return f"{kind}: the judge answered {error.status}: {' '.join(error.answer.split())}"
