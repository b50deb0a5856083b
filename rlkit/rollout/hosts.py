"""Where environments run, as seen from an episode: open, step, close; whatever goes wrong is one kind of error."""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
from collections.abc import Awaitable, Callable
from dataclasses import replace
from numbers import Real
from typing import Any, Protocol

from rlkit.environments.agent import Endpoint
from rlkit.environments.base import (
    Action,
    Environment,
    EnvironmentConfig,
    EnvironmentContext,
    EnvironmentFailure,
    Step,
    Task,
    as_messages,
    first_messages,
    settled,
)
from rlkit.environments.tool import Tool, ToolsChangedError
from rlkit.experience import Message
from rlkit.experience.texts import encodable

log = logging.getLogger(__name__)


class EpisodeFailedError(Exception):
    """Raised when an episode's environment broke, which is not the policy's fault."""

    def __init__(self, kind: str, details: str, again: bool = True, innocent: bool = False) -> None:
        """`kind`: a short class (`timeout`, `died`, `exception`, ...). `again`: a retry may help. `innocent`: another
        episode was the cause, so a retry does not count towards `environment.retries`."""
        super().__init__(kind, details, again, innocent)
        self.kind, self.details, self.again, self.innocent = kind, details, again, innocent

    def __str__(self) -> str:
        return f"{self.kind}: {self.details}"


class Host(Protocol):
    """Runs the environments of a rollout worker, one per open episode. Methods of an episode raise
    EpisodeFailedError, or ToolsChangedError."""

    tools: tuple[Tool, ...]
    """Known once it has started."""

    async def start(self) -> None:
        """Prepare the environments. Raises UserError, or what `prepare` raises."""

    async def open(self, key: str, task: Task, seed: int) -> tuple[Message, ...]:
        """Create an environment under a new `key` and reset it; return the conversation that it begins with."""

    async def step(self, key: str, action: Action | Endpoint) -> Step:
        """Return the environment's answer, its observation a tuple of messages. An agent gets an Endpoint, and runs."""

    async def close(self, key: str) -> None:
        """Close an environment, even after a failure or if nothing is open. Raises nothing."""


class InlineHost:
    """Runs environments in the caller's event loop: for those that take microseconds, or await."""

    def __init__(self, cls: type[Environment], config: EnvironmentConfig) -> None:
        self.cls, self.config = cls, config
        self.tools: tuple[Tool, ...] = ()
        self._open: dict[str, Environment] = {}

    async def start(self) -> None:
        shared = await settled(self.cls.prepare(self.config))
        self.tools = self.cls.tools(self.config, shared)
        self._context = EnvironmentContext(self.tools, shared)

    async def open(self, key: str, task: Task, seed: int) -> tuple[Message, ...]:
        async def reset() -> tuple[Message, ...]:
            environment = self._open[key] = self.cls(self.config, self._context)
            return first_messages(task, _checked(await self._in_time(environment.reset(task, seed)), "reset"))

        return await self._guarded(reset)

    async def step(self, key: str, action: Action | Endpoint) -> Step:
        environment: Any = self._open[key]

        async def step() -> Step:
            return checked_step(await self._in_time(environment.step(action)))

        return await self._guarded(step)

    async def _in_time(self, answer: Any) -> Any:
        """Await an answer until the deadline, which holds only for what awaits."""
        if not inspect.isawaitable(answer):
            return answer
        try:
            async with asyncio.timeout(self.config.step_timeout_seconds) as limit:
                return await answer
        except TimeoutError as error:
            if not limit.expired():  # the environment's own timeout
                raise
            details = f"no answer within environment.step_timeout_seconds={self.config.step_timeout_seconds:g}"
            raise EpisodeFailedError("timeout", details) from error

    async def _guarded(self, work: Callable[[], Awaitable[Any]]) -> Any:
        try:
            return await work()
        except (EpisodeFailedError, ToolsChangedError):
            raise
        except EnvironmentFailure as error:
            raise EpisodeFailedError("failure", str(error) or "the environment gave no reason") from error
        except Exception as error:
            log.debug("an environment raised", exc_info=True)
            raise EpisodeFailedError("exception", f"{type(error).__name__}: {error}") from error

    async def close(self, key: str) -> None:
        environment = self._open.pop(key, None)
        if environment is None:
            return
        try:
            await self._in_time(environment.close())
        except Exception:
            log.warning("%s.close() failed", self.cls.__name__, exc_info=True)


def checked_step(step: Any) -> Step:
    """Return the step with plain numbers and messages. Raises EpisodeFailedError for anything that is not a Step, or
    has numbers that are not finite."""
    if not isinstance(step, Step):
        raise EpisodeFailedError("wrong_type", f"step() returned {_described(step)}, not a Step", again=False)
    numbers = {"reward": step.reward, **step.metrics}
    for name, number in numbers.items():
        if not isinstance(number, Real):
            raise EpisodeFailedError(
                "wrong_type", f"{name} of a Step is {_described(number)}, not a number", again=False
            )
        if not math.isfinite(number):
            raise EpisodeFailedError("not_finite", f"{name} of a Step is {number}", again=False)
    if not isinstance(step.state, str | None):
        raise EpisodeFailedError("wrong_type", f"state of a Step is {_described(step.state)}, not text", again=False)
    return replace(
        step,
        observation=_checked(step.observation, "step"),
        reward=float(step.reward),
        done=bool(step.done),
        success=None if step.success is None else bool(step.success),
        metrics={name: float(number) for name, number in step.metrics.items()},
    )


def _checked(said: Any, method: str) -> tuple[Message, ...]:
    """Return the messages of a text, a message, messages, or None. Half characters, which no tokenizer accepts, become
    `?`."""
    parts = said if isinstance(said, list | tuple) else [said]
    plain = said is None or isinstance(said, str)
    wrong = [part for part in parts if not plain and not isinstance(part, Message)]
    wrong += [part.content for part in parts if isinstance(part, Message) and not isinstance(part.content, str)]
    if wrong:
        details = f"{method}() says {_described(wrong[0])}, not text, a Message or a list of Messages"
        raise EpisodeFailedError("wrong_type", details, again=False)
    return tuple(replace(m, content=encodable(m.content)) for m in as_messages(said))


def _described(value: object) -> str:
    return f"{type(value).__name__} {value!r:.80}"
