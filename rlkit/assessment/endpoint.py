"""Answers from an OpenAI-compatible server: chat completions, one request per answer."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np

from rewards.services.http import HttpClient, HttpError, Limits, TransientError, excerpt, get, json_body
from rlkit.assessment.schema import EvaluateRun
from rlkit.experience import Group, Message, Sample, UserError
from rlkit.experience.types import FinishReason
from rlkit.rollout.requests import GroupRequest, sample_seed

log = logging.getLogger(__name__)

CONNECT_SECONDS = 10.0
TRIES = 6
MOST_FAILURES = 20
"""Consecutive requests that may fail before the evaluation ends, because the server is gone."""


class EndpointError(UserError):
    """The server cannot be used; the message says why."""


def address_problem(url: str) -> str | None:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return "must be http://HOST:PORT/v1 or https://HOST/v1"
    if parts.username or parts.password or parts.query or parts.fragment:
        return "must be only an address; a secret belongs in the environment variable that model.token_env names"
    return None


def token_problem(url: str, variable: str) -> str | None:
    from rlkit.serving.http.app import is_loopback

    parts = urlsplit(url)
    if parts.scheme == "http" and not is_loopback(parts.hostname or ""):
        return f"its token would go to {parts.hostname} unencrypted: use https, or a tunnel to 127.0.0.1"
    if not os.environ.get(variable, "").strip():
        return f"the environment has no {variable}; `export {variable}=...` first"
    return None


class Endpoint:
    """Must be used from a single event loop."""

    def __init__(self, config: EvaluateRun) -> None:
        model = config.model
        assert model.url is not None
        self.config, self.url = config, model.url.rstrip("/")
        self.token = None if model.token_env is None else os.environ[model.token_env].strip()
        self.name = model.name
        self.lengths: dict[tuple[str, int], int] = {}
        """(group, index of an answer) -> its number of tokens, as counted by the server."""
        self.failures: dict[tuple[str, int], str] = {}
        """(group, index of an answer) -> why there is no answer."""
        most = config.rollout.max_concurrent_samples
        limits = Limits(attempts=TRIES, connect_seconds=CONNECT_SECONDS, concurrent=most)
        self._slots = asyncio.Semaphore(most)
        self._http = HttpClient([f"{self.url}/chat/completions"], limits, self.token, log_retries=True)
        self._failures = 0

    async def start(self) -> None:
        """Find the model's name. Raises EndpointError if there is no server, or if it has several models."""
        if self.name is not None:
            return
        try:
            answer = await asyncio.to_thread(get, f"{self.url}/models", CONNECT_SECONDS, self.token)
            names = [str(model["id"]) for model in answer.json()["data"]] if answer.status_code == 200 else []
        except TransientError as error:
            raise EndpointError(f"model.url={self.url}: nobody answers there ({error.problem})") from error
        except (ValueError, LookupError, TypeError) as error:
            raise EndpointError(f"model.url={self.url}: /models lists no models: {excerpt(answer)}") from error
        if len(names) != 1:
            listed = f"has {', '.join(names)}" if names else f"answers {answer.status_code} to /models"
            raise EndpointError(f"model.url={self.url}: the server {listed}; name one with model.name=NAME")
        self.name = names[0]

    async def generate(self, requests: Sequence[GroupRequest]) -> AsyncIterator[list[Group]]:
        """Yield groups as they finish. An answer that the server fails to give is empty and listed in `failures`.

        Raises EndpointError if the server refuses requests, or fails to answer many times in a row.
        """
        tasks = [asyncio.ensure_future(self._group(request)) for request in requests]
        try:
            for done in asyncio.as_completed(tasks):
                yield [await done]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def close(self) -> None:
        await self._http.close()

    async def _group(self, request: GroupRequest) -> Group:
        answers = await asyncio.gather(*(self._answer(request, index) for index in range(request.samples)))
        return Group(request.id, request.prompt, tuple(answers), step=request.step)

    async def _answer(self, request: GroupRequest, index: int) -> Sample:
        fields = self._fields(request, index)
        try:
            async with self._slots:  # the time limit of an answer starts when it is requested
                deadline = time.monotonic() + self.config.evaluate.answer_timeout_seconds
                text, reason, length = await self._http.post(json_body(fields), deadline, _read)
            self._failures = 0
        except HttpError as error:
            self._failures += 1
            if error.status is not None and 400 <= error.status < 500 and error.status not in (408, 425, 429):
                raise EndpointError(f"the server refuses a question ({request.prompt.id}): {error}") from error
            if self._failures >= MOST_FAILURES:
                raise EndpointError(f"{self._failures} requests in a row got no answer; last error: {error}") from error
            log.warning("no answer to %s: %s", request.prompt.id, error)
            self.failures[request.id, index] = f"no_answer: {error}"
            text, reason, length = "", "abort", None
        if length is not None:
            self.lengths[request.id, index] = length
        none = np.zeros(0)
        return Sample(index, none.astype(np.int32), None, text, reason, (0, 0), seed=fields.get("seed", 0))

    def _fields(self, request: GroupRequest, index: int) -> dict[str, Any]:
        rollout = self.config.rollout
        own = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "top_p": 1.0}
        unusual = {name: value for name in own if (value := getattr(rollout, name)) != own[name]}
        fields = {
            "model": self.name,
            "messages": [_plain(message) for message in request.prompt.messages],
            "temperature": rollout.temperature if request.temperature is None else request.temperature,
            "max_tokens": rollout.max_response_tokens,
            **unusual,
        }
        if rollout.stop_texts:
            fields["stop"] = rollout.stop_texts
        if rollout.sample_seeds != "never":
            fields["seed"] = sample_seed(request.seed, request.id, index) >> 32  # some servers accept only 31 bits
        return fields


def _plain(message: Message) -> dict[str, str]:
    return {"role": message.role, "content": message.content}


def _read(response: httpx.Response) -> tuple[str, FinishReason, int | None]:
    """Return (text, finish reason, number of tokens)."""
    try:
        answer = response.json()
        choice = answer["choices"][0]
        message = choice["message"]
        text = message.get("content") or ""
        thought = message.get("reasoning_content") or message.get("reasoning")
        reason = choice.get("finish_reason")
        tokens = (answer.get("usage") or {}).get("completion_tokens")
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        problem = f"no chat completion ({type(error).__name__}): {excerpt(response)}"
        raise TransientError(str(response.url), problem, response.status_code) from error
    if isinstance(thought, str) and thought:
        text = f"<think>\n{thought}\n</think>\n\n{text}"
    return text, reason if reason in ("stop", "length") else "abort", tokens if isinstance(tokens, int) else None
