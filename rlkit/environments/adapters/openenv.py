"""`environment=openenv`: an OpenEnv server, over its WebSocket; each episode is a connection."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pydantic import Field

from rewards.services.http import HttpError, get, require_ok
from rlkit.environments.adapters.game import seeded_tasks
from rlkit.environments.base import Action, Environment, EnvironmentFailure, EnvironmentNeeds, Step, Task
from rlkit.environments.games.drawing import DrawnConfig, Split
from rlkit.environments.tool import Tool
from rlkit.experience import ToolCall, UserError
from rlkit.experience.extras import lacking

if TYPE_CHECKING:
    from websockets.asyncio.client import ClientConnection

_READERS = {"integer": int, "number": float, "string": str}
_LARGEST_MESSAGE = 2**26
_CONNECT_SECONDS = 10.0


class OpenEnvConfig(DrawnConfig):
    url: str = Field(pattern="^https?://")
    """Address of the server: http://127.0.0.1:8000."""
    action_field: str | None = None
    """Field of the server's action that the policy's text fills; null: the only required one. If there are several, the
    policy writes a JSON object."""
    observation_field: str | None = None
    """Field of the server's observation that the policy reads; null: the only one, else all fields as JSON."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the server's `reset`, besides the seed."""
    concurrency: int = Field(default=1, ge=1)
    """Open episodes per process. The server must allow rollout.workers x workers x concurrency sessions; by default it
    allows one."""


@dataclass(frozen=True)
class _Server:
    fields: Mapping[str, Any]
    """Fields of an action: JSON schemas by name."""
    required: tuple[str, ...]
    tools: tuple[Tool, ...]
    """Tools of a server whose actions are tool calls."""


class OpenEnv(Environment):
    """Rewards are the server's, step by step. It does not say whether an episode was a success.

    If the server's actions are tool calls, the policy gets these tools, and an answer without a call ends the episode.
    """

    Config = OpenEnvConfig
    config: OpenEnvConfig

    @classmethod
    def needs(cls, config: OpenEnvConfig) -> EnvironmentNeeds:
        return EnvironmentNeeds(columns=("seed",))

    @classmethod
    def check(cls, config: OpenEnvConfig) -> list[str]:
        return lacking("websockets", extra="openenv")

    @classmethod
    def deterministic(cls, config: OpenEnvConfig) -> bool:
        """Return False: a server is not known to be deterministic."""
        return False

    @classmethod
    def tasks(cls, config: OpenEnvConfig, split: Split, seed: int) -> list[Task]:
        return seeded_tasks(config, urlsplit(config.url).netloc, split, seed)

    @classmethod
    def prepare(cls, config: OpenEnvConfig) -> _Server:
        """Read the server's schema and tools. Raises UserError."""
        base = config.url.rstrip("/")
        try:
            schema = require_ok(get(f"{base}/schema", _CONNECT_SECONDS)).json()["action"]
            fields = {name: field for name, field in schema["properties"].items() if name != "metadata"}
            tools = _tools(base) if {"tool_name", "arguments"} <= fields.keys() else ()
        except (HttpError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"environment.url={config.url}: no OpenEnv server answers: {error}") from error
        if config.action_field is not None and config.action_field not in fields:
            there = ", ".join(fields) or "none"
            raise UserError(
                f"environment.action_field={config.action_field}: the fields of the server's actions: {there}"
            )
        return _Server(fields, tuple(name for name in schema.get("required", ()) if name in fields), tools)

    @classmethod
    def tools(cls, config: OpenEnvConfig, shared: _Server) -> tuple[Tool, ...]:
        return shared.tools

    async def reset(self, task: Task, seed: int) -> str:
        """Start the episode. Waits for a session that has just ended, because the server frees its slot a little
        later."""
        drawing = {**self.config.options, "seed": int(task.columns["seed"])}
        latest = time.monotonic() + 0.8 * self.config.step_timeout_seconds
        while True:
            self._socket = await _connected(self.config.url)
            try:
                return self._read(await self._asked("reset", drawing))
            except _FullError as error:
                await self._socket.close()
                if time.monotonic() > latest:
                    raise EnvironmentFailure(
                        f"{error}; lower environment.concurrency, or allow the server more sessions "
                        "(max_concurrent_envs)"
                    ) from error
                await asyncio.sleep(0.1)

    async def step(self, action: Action) -> Step:
        server: _Server = self.context.shared
        if server.tools:
            return await self.run_tools(action) if action.calls else Step(done=True)
        try:
            fields = self._action(server, action.text)
        except ValueError as error:
            return Step(f"error: {error}")
        try:
            return self._step(await self._asked("step", fields))
        except _RefusedError as error:
            return Step(f"error: {error}")

    async def call(self, call: ToolCall) -> Step:
        fields = {"type": "call_tool", "tool_name": call.name, "arguments": dict(call.arguments or {})}
        try:
            return self._step(await self._asked("step", fields))
        except _RefusedError as error:
            return Step(f"error: {error}")

    async def close(self) -> None:
        if hasattr(self, "_socket"):
            await self._socket.close()

    def _action(self, server: _Server, text: str) -> dict[str, Any]:
        """Turn the policy's text into an action. Raises ValueError with a message for the policy."""
        names = [self.config.action_field] if self.config.action_field else server.required or tuple(server.fields)
        if len(names) == 1 and names[0] is not None:
            kind = server.fields[names[0]].get("type", "string")
            if kind in _READERS:
                try:
                    return {names[0]: _READERS[kind](text.strip())}
                except ValueError:
                    raise ValueError(f"say {'a whole number' if kind == 'integer' else 'a number'} alone") from None
        begin, end = text.find("{"), text.rfind("}")
        try:
            fields = json.loads(text[begin : end + 1]) if begin >= 0 else None
        except ValueError as error:
            raise ValueError(f"this is not JSON: {error}") from None
        if not isinstance(fields, dict):
            raise ValueError(f"say a JSON object with {', '.join(server.fields)}")
        return fields

    async def _asked(self, kind: str, data: Mapping[str, Any]) -> dict[str, Any]:
        """Send a request and return the answer. Raises EnvironmentFailure, _FullError and _RefusedError."""
        from websockets.exceptions import ConnectionClosed

        try:
            with contextlib.suppress(ConnectionClosed):  # a full server says so before it closes
                await self._socket.send(json.dumps({"type": kind, "data": data}))
            answer: Any = json.loads(await self._socket.recv())
            said: dict[str, Any] = answer["data"]
        except (ConnectionClosed, ValueError, KeyError, TypeError) as error:
            raise EnvironmentFailure(f"{self.config.url}: {type(error).__name__}: {error}") from error
        if answer["type"] != "error":
            return said
        code, details = said.get("code"), f"{said.get('message')}"
        if code == "CAPACITY_REACHED":
            raise _FullError(f"{self.config.url}: {details}")
        if code == "VALIDATION_ERROR":
            faults = [f"{'.'.join(map(str, one.get('loc', ())))}: {one.get('msg')}" for one in said.get("errors", ())]
            raise _RefusedError("; ".join(faults) or details)
        raise EnvironmentFailure(f"{self.config.url}: {code}: {details}")

    def _step(self, said: Mapping[str, Any]) -> Step:
        return Step(self._read(said), reward=float(said.get("reward") or 0.0), done=bool(said.get("done")))

    def _read(self, said: Mapping[str, Any]) -> str:
        observation = {name: value for name, value in said["observation"].items() if name != "metadata"}
        wanted = self.config.observation_field
        if wanted is not None:
            if wanted not in observation:
                raise EnvironmentFailure(
                    f"environment.observation_field={wanted}: the observation has {', '.join(observation)}"
                )
            value = observation[wanted]
        elif "tool_name" in observation and "result" in observation:
            value = _of_tool(observation)
        else:
            value = next(iter(observation.values())) if len(observation) == 1 else observation
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


class _FullError(Exception):
    """All sessions of the server are taken."""


class _RefusedError(Exception):
    """The action does not fit the server's schema."""


async def _connected(url: str) -> ClientConnection:
    """Open a connection. Raises EnvironmentFailure."""
    from websockets.asyncio.client import connect

    address = f"ws{url.rstrip('/').removeprefix('http')}/ws"
    try:
        return await connect(address, max_size=_LARGEST_MESSAGE, open_timeout=_CONNECT_SECONDS)
    except (OSError, TimeoutError) as error:
        raise EnvironmentFailure(f"{url}: {type(error).__name__}: {error}") from error


def _tools(base: str) -> tuple[Tool, ...]:
    import httpx

    asked = {"jsonrpc": "2.0", "id": 1, "method": "tools/list", "params": {}}
    try:
        answer = httpx.post(f"{base}/mcp", json=asked, timeout=_CONNECT_SECONDS).json()
    except httpx.HTTPError as error:
        raise ValueError(f"it does not list its tools: {error}") from error
    tools = answer["result"]["tools"]
    return tuple(
        Tool(one["name"], one.get("description") or "", one.get("inputSchema") or one.get("input_schema") or {})
        for one in sorted(tools, key=lambda one: one["name"])
    )


def _of_tool(observation: Mapping[str, Any]) -> Any:
    """What a tool returned, or why it failed."""
    if observation.get("error"):
        return f"error: {observation['error'].get('message', observation['error'])}"
    result = observation["result"]
    if isinstance(result, Mapping) and "content" in result:
        texts = [part.get("text", "") for part in result["content"] if isinstance(part, Mapping)]
        return "\n".join(texts) if texts else result.get("data")
    return result
