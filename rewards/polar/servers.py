"""A client of a discriminator behind HTTP: token ids in, raw logits out.

It does not send text, because a server may tokenise it differently (another BOS token or tokenizer class) and silently
score another input.
"""

from __future__ import annotations

import asyncio
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any, ClassVar

import httpx

from rewards.services.http import HttpClient, Limits, OutOfTimeError, RefusedError, excerpt, json_body
from rlkit.experience import UserError

if TYPE_CHECKING:
    from rlkit.models.packing import Tree


class WrongAnswer(ValueError): ...


class WireFormat(ABC):
    path: ClassVar[str]
    key: ClassVar[str] = "input"
    """The request's field for the inputs."""
    options: ClassVar[Mapping[str, Any]] = {}

    def body(self, inputs: Sequence[Sequence[int]], model: str | None) -> dict[str, Any]:
        named = {} if model is None else {"model": model}
        return {self.key: [list(ids) for ids in inputs], **self.options, **named}

    @abstractmethod
    def entries(self, answer: Any) -> list[Any]:
        """Return one entry per input, in order. Raise KeyError or TypeError for any other format."""

    def scores(self, answer: Any, inputs: int) -> list[float]:
        """Read the scores from an answer. Raise WrongAnswer."""
        try:
            entries = self.entries(answer)
        except (KeyError, TypeError, AttributeError) as error:
            raise WrongAnswer(f"an answer in another format ({type(error).__name__}: {error})") from error
        if len(entries) != inputs:
            raise WrongAnswer(f"{len(entries)} scores for {inputs} inputs")
        return [last_number(entry) for entry in entries]


class VllmWire(WireFormat):
    """`POST /pooling` of vLLM 0.8 and later: a score (sequence classifier), or one per token (InternLM2)."""

    path = "/pooling"
    options: ClassVar = {"use_activation": False}
    """By default vLLM returns the sigmoid of the score."""

    def entries(self, answer: Any) -> list[Any]:
        return [entry["data"] for entry in sorted(answer["data"], key=lambda entry: int(entry["index"]))]


class SglangWire(WireFormat):
    """SGLang's `POST /classify`, started with `--is-embedding`."""

    path = "/classify"
    key = "input_ids"

    def entries(self, answer: Any) -> list[Any]:
        """Return one entry per input; some versions answer a single input with a bare object."""
        return [entry["embedding"] for entry in (answer if isinstance(answer, list) else [answer])]


class LmdeployWire(WireFormat):
    """`POST /pooling` of LMDeploy 0.9.1 and later, PyTorch engine."""

    path = "/pooling"

    def entries(self, answer: Any) -> list[Any]:
        return [entry["data"] for entry in sorted(answer["data"], key=lambda entry: int(entry.get("index", 0)))]


WIRES: dict[str, WireFormat] = {"http_vllm": VllmWire(), "http_sglang": SglangWire(), "http_lmdeploy": LmdeployWire()}


def last_number(entry: Any) -> float:
    """Return a number, or the last number of a list or nested lists: the score at the last token.

    JSON has no NaN, so null is read as NaN. Raise WrongAnswer if there is no number.
    """
    last = entry
    while isinstance(last, list) and last:
        last = last[-1]
    if last is None:
        return math.nan
    if isinstance(last, bool) or not isinstance(last, int | float):
        raise WrongAnswer(f"{str(entry)[:80]!r} instead of a score")
    try:
        return float(last)
    except OverflowError as error:
        raise WrongAnswer(f"a number of {len(str(last))} digits instead of a score") from error


REFUSES_INPUT = (400, 413, 422)
"""HTTP status codes that one input may have caused (by its length, say); the request is halved to find it."""
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 10.0
"""Seconds between tries."""


class ServerError(UserError): ...


@dataclass(frozen=True)
class Server:
    urls: tuple[str, ...]
    wire: WireFormat
    model: str | None = None
    api_key: str | None = None
    tokens_per_request: int = 65536
    concurrent_requests: int = 8
    request_timeout_seconds: float = 30.0


class ServerBackend:
    """Scores through one server or its replicas. Every call ends within `deadline_seconds`."""

    def __init__(self, server: Server, deadline_seconds: float) -> None:
        self.server = server
        self.deadline_seconds = deadline_seconds
        self._limits = Limits(
            try_seconds=server.request_timeout_seconds,
            concurrent=server.concurrent_requests,
            first_pause=FIRST_PAUSE,
            longest_pause=LONGEST_PAUSE,
        )
        self._calls = count()

    def score(self, trees: Sequence[Tree]) -> list[float | str]:
        """Return raw logits in order; instead of a logit, the reason if the server refuses an input.

        Raise ServerError if there is no complete answer in time, or if there can be none.
        """
        sequences = [[*tree.prefix, *suffix] for tree in trees for suffix in tree.suffixes]
        return asyncio.run(self._score(sequences)) if sequences else []

    def close(self) -> None: ...

    async def _score(self, sequences: Sequence[Sequence[int]]) -> list[float | str]:
        server, deadline = self.server, time.monotonic() + self.deadline_seconds
        first = next(self._calls) % len(server.urls)  # calls with one request each also rotate
        urls = [url + server.wire.path for url in (*server.urls[first:], *server.urls[:first])]
        try:
            # Proxies set in the environment are for the web, not for a model server.
            async with (
                HttpClient(urls, self._limits, server.api_key, trust_env=False, log_retries=True) as http,
                asyncio.TaskGroup() as tasks,
            ):
                work = [
                    tasks.create_task(self._request(http, chunk, deadline))
                    for chunk in chunks(sequences, server.tokens_per_request)
                ]
        except ExceptionGroup as group:  # the first failure ended the other requests
            error = group.exceptions[0]
            if not isinstance(error, OutOfTimeError):
                raise error from None
            cause = f"{error.last} ({error.last.tries} tries)" if error.last else "requests were still open"
            raise ServerError(
                f"no scores for {len(sequences)} inputs within {self.deadline_seconds:.3g} s from "
                f"{', '.join(server.urls)}: {cause}"
            ) from None
        return [score for task in work for score in task.result()]

    async def _request(self, http: HttpClient, inputs: Sequence[Sequence[int]], deadline: float) -> list[float | str]:
        """Send one request; if it is refused, send its halves."""

        def read(answer: httpx.Response) -> list[float | str]:
            try:
                return list(self.server.wire.scores(json_of(answer), len(inputs)))
            except WrongAnswer as error:
                said = f"{answer.url}: HTTP 200: {excerpt(answer)}"
                raise ServerError(f"{said}: {error} (is this the kind of server that reward.backend names?)") from error

        try:
            return await http.post(json_body(self.server.wire.body(inputs, self.server.model)), deadline, read)
        except RefusedError as refused:
            if refused.status not in REFUSES_INPUT:
                raise ServerError(
                    f"{refused} (trying again would not help: check urls, served_model and the key)"
                ) from refused
            if len(inputs) == 1:
                return [f"refused: {refused}"]
        half = len(inputs) // 2
        return [score for part in (inputs[:half], inputs[half:]) for score in await self._request(http, part, deadline)]


def json_of(answer: httpx.Response) -> Any:
    try:
        return answer.json()
    except (ValueError, RecursionError) as error:  # not JSON or UTF-8, 5,000-digit numbers; deep nesting
        raise WrongAnswer(f"not JSON ({type(error).__name__}: {error})") from error


def chunks(sequences: Sequence[Sequence[int]], limit: int) -> list[list[Sequence[int]]]:
    """Split into parts of at most `limit` tokens (or one sequence); neighbours, which share prefixes, stay together."""
    parts: list[list[Sequence[int]]] = []
    room = 0
    for ids in sequences:
        if not parts or len(ids) > room:
            parts.append([])
            room = limit
        parts[-1].append(ids)
        room -= len(ids)
    return parts
