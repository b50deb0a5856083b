"""What the servers that run a discriminator are sent, and what they answer: token ids in, raw logits out.

Token ids, not text: a server may tokenise differently (another BOS, another tokenizer class), and the score would
silently be that of another input.

A discriminator behind HTTP: requests cut by tokens, some at a time, tried again with back-off, and a clear end.
"""

from __future__ import annotations

import asyncio
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any, ClassVar

from rlkit.experience import UserError

if TYPE_CHECKING:
    import httpx
    from tenacity import RetryCallState

    from rlkit.models.packing import Tree


class WrongAnswer(ValueError):
    """An answer that is not in the server's wire format."""


class WireFormat(ABC):
    """How one kind of server is asked for scores."""

    path: ClassVar[str]

    @abstractmethod
    def body(self, inputs: Sequence[Sequence[int]], model: str | None) -> dict[str, Any]:
        """The JSON of a request."""

    @abstractmethod
    def entries(self, answer: Any) -> list[Any]:
        """One entry per input, in order. Raises KeyError or TypeError for another format."""

    def scores(self, answer: Any, inputs: int) -> list[float]:
        """The raw logits of an answer to `inputs` inputs. Raises WrongAnswer."""
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

    def body(self, inputs: Sequence[Sequence[int]], model: str | None) -> dict[str, Any]:
        """Without `use_activation: false` vLLM answers the sigmoid of the score."""
        body: dict[str, Any] = {"input": [list(ids) for ids in inputs], "use_activation": False}
        return body if model is None else {**body, "model": model}

    def entries(self, answer: Any) -> list[Any]:
        return [entry["data"] for entry in sorted(answer["data"], key=lambda entry: int(entry["index"]))]


class SglangWire(WireFormat):
    """SGLang's own `POST /classify`, started with `--is-embedding`."""

    path = "/classify"

    def body(self, inputs: Sequence[Sequence[int]], model: str | None) -> dict[str, Any]:
        body: dict[str, Any] = {"input_ids": [list(ids) for ids in inputs]}
        return body if model is None else {**body, "model": model}

    def entries(self, answer: Any) -> list[Any]:
        """A list; for a single input some versions answer with the object alone."""
        return [entry["embedding"] for entry in (answer if isinstance(answer, list) else [answer])]


class LmdeployWire(WireFormat):
    """`POST /pooling` of LMDeploy 0.9.1 and later, PyTorch engine."""

    path = "/pooling"

    def body(self, inputs: Sequence[Sequence[int]], model: str | None) -> dict[str, Any]:
        body: dict[str, Any] = {"input": [list(ids) for ids in inputs]}
        return body if model is None else {**body, "model": model}

    def entries(self, answer: Any) -> list[Any]:
        return [entry["data"] for entry in sorted(answer["data"], key=lambda entry: int(entry.get("index", 0)))]


WIRES: dict[str, WireFormat] = {"http_vllm": VllmWire(), "http_sglang": SglangWire(), "http_lmdeploy": LmdeployWire()}
"""Backend name -> wire format."""


def last_number(entry: Any) -> float:
    """The score in a number, a list of numbers or a list of lists: the last one, which stands at the last token.

    JSON knows no NaN, so null is one. Raises WrongAnswer if there is no number.
    """
    found = entry
    while isinstance(found, list) and found:
        found = found[-1]
    if found is None:
        return math.nan
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise WrongAnswer(f"{str(entry)[:80]!r} where a score belongs")
    try:
        return float(found)
    except OverflowError as error:
        raise WrongAnswer(f"a number of {len(str(found))} digits where a score belongs") from error


log = logging.getLogger(__name__)

REFUSES_INPUT = (400, 413, 422)
"""Answers that may be about one input of a request (too long, say): the request is halved to find it."""
PASSES = (408, 425, 429, 500, 502, 503, 504, 529)
"""Answers that say nothing about the input: try again."""
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 10.0
"""Seconds between tries: doubled each time, with as much again of chance at most."""
SHOWN = 300
"""Characters of an answer that messages quote."""


class ServerError(UserError):
    """A server that does not score; the message names it, what it said, and what was tried."""


class _TryAgain(Exception):
    """A failure that may pass."""


class _Refused(Exception):
    """The server does not take an input of this request."""


@dataclass(frozen=True)
class Server:
    """Where a discriminator answers, and how it is asked."""

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
        self._turn = count()

    def score(self, trees: Sequence[Tree]) -> list[float | str]:
        """Raw logits of all sequences, in order; a reason in the place of one that the server refuses to score.

        Raises ServerError if there is no (whole) answer in time, or none to be hoped for.
        """
        sequences = [[*tree.prefix, *suffix] for tree in trees for suffix in tree.suffixes]
        return asyncio.run(self._score(sequences)) if sequences else []

    def close(self) -> None:
        """Nothing is kept open between calls."""

    async def _score(self, sequences: Sequence[Sequence[int]]) -> list[float | str]:
        import httpx

        key = self.server.api_key
        room = asyncio.Semaphore(self.server.concurrent_requests)
        last: list[str] = []
        try:
            # Proxies of the environment are for the web, not for a model server.
            async with (
                asyncio.timeout(self.deadline_seconds),
                httpx.AsyncClient(
                    timeout=self.server.request_timeout_seconds,
                    headers={} if key is None else {"Authorization": f"Bearer {key}"},
                    trust_env=False,
                ) as client,
                asyncio.TaskGroup() as tasks,
            ):
                work = [
                    tasks.create_task(self._request(client, room, chunk, last))
                    for chunk in chunks(sequences, self.server.tokens_per_request)
                ]
        except TimeoutError:
            cause = last[-1] if last else "requests were still open"
            raise ServerError(
                f"no scores for {len(sequences)} inputs within {self.deadline_seconds:.3g} s from "
                f"{', '.join(self.server.urls)}: {cause}"
            ) from None
        except ExceptionGroup as group:  # the first that failed ended the others
            raise group.exceptions[0] from None
        return [score for task in work for score in task.result()]

    async def _request(
        self, client: httpx.AsyncClient, room: asyncio.Semaphore, inputs: Sequence[Sequence[int]], last: list[str]
    ) -> list[float | str]:
        """Scores of one request's inputs; halved if the server refuses it."""
        try:
            async with room:
                return list(await self._tried_again(client, inputs, last))
        except _Refused as refused:
            if len(inputs) == 1:
                return [f"refused: {refused}"]
            half = len(inputs) // 2
            first = await self._request(client, room, inputs[:half], last)
            return first + await self._request(client, room, inputs[half:], last)

    async def _tried_again(
        self, client: httpx.AsyncClient, inputs: Sequence[Sequence[int]], last: list[str]
    ) -> list[float]:
        """Try until it succeeds or fails for good; the call's deadline ends it otherwise."""
        from tenacity import AsyncRetrying, retry_if_exception_type, wait_exponential, wait_random

        def note(state: RetryCallState) -> None:
            cause = str(state.outcome.exception() if state.outcome else "")
            last.append(f"{cause} ({state.attempt_number} tries)")
            log.warning("%s; trying again", cause)

        async for attempt in AsyncRetrying(
            retry=retry_if_exception_type(_TryAgain),
            wait=wait_exponential(FIRST_PAUSE, LONGEST_PAUSE) + wait_random(0, FIRST_PAUSE),
            before_sleep=note,
        ):
            with attempt:
                return await self._once(client, inputs)
        raise AssertionError("tenacity ended without a result")

    async def _once(self, client: httpx.AsyncClient, inputs: Sequence[Sequence[int]]) -> list[float]:
        import httpx

        server = self.server
        url = server.urls[next(self._turn) % len(server.urls)] + server.wire.path
        try:
            async with asyncio.timeout(server.request_timeout_seconds):  # httpx's own begins anew with every byte
                answer = await client.post(url, json=server.wire.body(inputs, server.model))
        except TimeoutError:
            raise _TryAgain(f"{url}: no answer within {server.request_timeout_seconds:g} s") from None
        except httpx.RequestError as error:  # with DecodingError: a body that is not the gzip it says
            raise _TryAgain(f"{url}: {type(error).__name__}: {error}") from error
        said = f"{url}: HTTP {answer.status_code}: {answer.text[:SHOWN]}"
        if answer.status_code in PASSES:
            raise _TryAgain(said)
        if answer.status_code in REFUSES_INPUT:
            raise _Refused(said)
        if answer.status_code != 200:
            raise ServerError(f"{said} (trying again would not help: check urls, served_model and the key)")
        try:
            return server.wire.scores(json_of(answer), len(inputs))
        except WrongAnswer as error:
            raise ServerError(f"{said}: {error} (is this the kind of server that backend names?)") from error


def json_of(answer: httpx.Response) -> Any:
    """The JSON of an answer. Raises WrongAnswer, whatever the server sent."""
    try:
        return answer.json()
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, a number of 5,000 digits; nested too deeply
        raise WrongAnswer(f"no JSON ({type(error).__name__}: {error})") from error


def chunks(sequences: Sequence[Sequence[int]], limit: int) -> list[list[Sequence[int]]]:
    """Neighbours together, at most `limit` tokens each (or one sequence): what shares a prefix stays together."""
    parts: list[list[Sequence[int]]] = []
    room = 0
    for ids in sequences:
        if not parts or len(ids) > room:
            parts.append([])
            room = limit
        parts[-1].append(ids)
        room -= len(ids)
    return parts
