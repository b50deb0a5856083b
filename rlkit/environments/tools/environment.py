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
from rlkit.environments.tools.mcp import Mcp
from rlkit.environments.tools.python import Python
from rlkit.environments.tools.search import Search
from rlkit.environments.tools.sql import Sql
from rlkit.environments.tools.user import User
from rlkit.experience import ToolCall, UserError


def _with_kind(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


BuiltIn = Annotated[
    Annotated[Calculator | Python | Search | Sql | Mcp | User, Field(discriminator="kind")], BeforeValidator(_with_kind)
]


class ToolsConfig(EnvironmentConfig):
    tools: tuple[BuiltIn, ...] = Field(min_length=1)
    """Tools that the policy may call: calculator, python, search, sql, mcp, user; with options:
    {kind:sql,database:shop.db}."""


class Tools(Environment):
    """Any answer without a call ends the episode, and the run's reward judges it.

    A subclass can add its own `@tool` methods and, after `super().reset(task, seed)`, anything else that an environment
    does.
    """

    Config = ToolsConfig
    config: ToolsConfig

    @classmethod
    def needs(cls, config: ToolsConfig) -> EnvironmentNeeds:
        return EnvironmentNeeds(columns=tuple(dict.fromkeys(name for one in config.tools for name in one.needs())))

    @classmethod
    def deterministic(cls, config: ToolsConfig) -> bool:
        return all(one.repeats() for one in config.tools)

    @classmethod
    def gives_rewards(cls, config: ToolsConfig) -> bool:
        return cls is not Tools or any(one.pays for one in config.tools)

    @classmethod
    def check(cls, config: ToolsConfig) -> list[str]:
        names = [one.name for one in tools_of(cls)] + [name for one in config.tools for name in one.names()]
        return _clashes(names) + [text for one in config.tools for text in one.check(config.step_timeout_seconds)]

    @classmethod
    async def prepare(cls, config: ToolsConfig) -> Sequence[Any]:
        return [await settled(one.prepare()) for one in config.tools]

    @classmethod
    def tools(cls, config: ToolsConfig, shared: Sequence[Any]) -> tuple[Tool, ...]:
        """Return all tools. Raises UserError if two have the same name."""
        built_in = (one.offers(prepared) for one, prepared in zip(config.tools, shared, strict=True))
        tools = (*tools_of(cls), *(tool for some in built_in for tool in some))
        if clashes := _clashes([tool.name for tool in tools]):
            raise UserError("; ".join(clashes))
        return tools

    def reset(self, task: Task, seed: int) -> Any:
        config, shared = self.config, self.context.shared
        seconds = config.step_timeout_seconds
        self._sessions: dict[str, Session] = {}
        for options, prepared in zip(config.tools, shared, strict=True):
            session = options.session(options, prepared, task, seconds)
            self._sessions |= {tool.name: session for tool in options.offers(prepared)}
        return None

    def call(self, call: ToolCall) -> Any:
        session = self._sessions.get(call.name)
        return super().call(call) if session is None else session.call(call.name, call.arguments or {})

    async def close(self) -> None:
        for session in dict.fromkeys(getattr(self, "_sessions", {}).values()):
            await settled(session.close())


def _clashes(names: Sequence[str]) -> list[str]:
    twice = [name for name, count in Counter(names).items() if count > 1]
    return [f"{name} is the name of two tools; give one of them another name: {{kind:...,name:...}}" for name in twice]
