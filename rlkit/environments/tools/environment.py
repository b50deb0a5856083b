"""The environment of `environment=tools`: the policy calls tools until it answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from rlkit.environments.base import Environment, EnvironmentConfig, EnvironmentNeeds, Task, settled
from rlkit.environments.tool import Tool, tools_of
from rlkit.environments.tools.base import Session
from rlkit.environments.tools.calculator import Calculator
from rlkit.environments.tools.python import Python
from rlkit.environments.tools.search import Search
from rlkit.environments.tools.sql import Sql
from rlkit.environments.tools.user import User
from rlkit.experience import ToolCall


def _with_kind(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


BuiltIn = Annotated[
    Annotated[Calculator | Python | Search | Sql | User, Field(discriminator="kind")], BeforeValidator(_with_kind)
]


class ToolsConfig(EnvironmentConfig):
    tools: tuple[BuiltIn, ...] = Field(min_length=1)
    """What the policy may call: calculator, python, search, sql, user; with options {kind:sql,database:shop.db}."""


class Tools(Environment):
    """Any answer without a call ends the episode, and the run's reward judges it.

    A subclass adds `@tool` methods of its own, and, after `super().reset(task, seed)`, what else an environment does.
    """

    Config = ToolsConfig
    config: ToolsConfig

    @classmethod
    def needs(cls, config: ToolsConfig) -> EnvironmentNeeds:
        return EnvironmentNeeds(columns=tuple(dict.fromkeys(name for one in config.tools for name in one.needs())))

    @classmethod
    def deterministic(cls, config: ToolsConfig) -> bool:
        return all(one.deterministic() for one in config.tools)

    @classmethod
    def check(cls, config: ToolsConfig) -> list[str]:
        names = [one.name for one in tools_of(cls)] + [one.name or one.kind for one in config.tools]
        twice = [name for name, count in Counter(names).items() if count > 1]
        messages = [f"{name} is the name of two tools; give one another: {{kind:...,name:...}}" for name in twice]
        return messages + [text for one in config.tools for text in one.check(config.step_timeout_seconds)]

    @classmethod
    def prepare(cls, config: ToolsConfig) -> Sequence[Any]:
        return [one.prepare() for one in config.tools]

    @classmethod
    def tools(cls, config: ToolsConfig, shared: Sequence[Any]) -> tuple[Tool, ...]:
        built_in = (one.tools(prepared) for one, prepared in zip(config.tools, shared, strict=True))
        return (*tools_of(cls), *(tool for tools in built_in for tool in tools))

    def reset(self, task: Task, seed: int) -> Any:
        config, shared = self.config, self.context.shared
        seconds = config.step_timeout_seconds
        self._sessions: dict[str, Session] = {}
        for options, prepared in zip(config.tools, shared, strict=True):
            session = options.session(options, prepared, task, seconds)
            self._sessions |= {tool.name: session for tool in options.tools(prepared)}
        return None

    def call(self, call: ToolCall) -> Any:
        session = self._sessions.get(call.name)
        return super().call(call) if session is None else session.call(call.name, call.arguments or {})

    async def close(self) -> None:
        for session in dict.fromkeys(getattr(self, "_sessions", {}).values()):
            await settled(session.close())
