"""The tool `mcp`: the tools of a Model Context Protocol server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import model_validator

from rlkit.environments.base import EnvironmentFailure, Task
from rlkit.environments.tool import Tool, ToolsChangedError, changes
from rlkit.environments.tools.base import STEP_SHARE, Session, ToolOptions
from rlkit.environments.tools.mcp_connection import Connection, ConnectionFailed, Listed, ServerOptions
from rlkit.experience import UserError

if TYPE_CHECKING:
    from mcp_types import CallToolResult

START_SECONDS = 60.0
_OLDEST = (2, 3)
_LACKING = "needs the package mcp: install rlkit with its extra (pip install -e .[mcp]), or pip install 'mcp>=2.3,<3'"


class _Server:
    """A server as one process of the environment holds it."""

    def __init__(self, options: Mcp) -> None:
        self.options = options
        self.tools: tuple[Tool, ...] = ()
        """The tools that it had at the start."""
        self._shared: asyncio.Task[Connection] | None = None

    async def start(self) -> None:
        """Connect and read the server's tools. Raises UserError."""
        try:
            connection = await self.shared()
        except (ConnectionFailed, UserError) as error:
            raise UserError(f"mcp: {self.options.where}: {error}") from error
        self.tools = connection.tools
        if self.options.per_episode:
            await connection.close()

    async def new(self) -> Connection:
        """Open a connection. Raises ConnectionFailed or UserError."""
        connection = Connection(self.options, self.options.chosen)
        try:
            async with asyncio.timeout(START_SECONDS):
                await connection.open()
        except TimeoutError as error:
            raise ConnectionFailed(f"it did not start within {START_SECONDS:g} s") from error
        return connection

    async def shared(self) -> Connection:
        """Return the connection for all episodes, replaced if it was retired. Raises ConnectionFailed or UserError."""
        task = self._shared
        if task is None or (task.done() and (task.exception() is not None or task.result().retired)):
            task = self._shared = asyncio.create_task(self.new())
        return await asyncio.shield(task)  # a caller that times out must not cancel the start for the others


class McpSession(Session):
    options: Mcp
    shared: _Server

    def __init__(self, options: Mcp, shared: _Server, task: Task, seconds: float) -> None:
        super().__init__(options, shared, task, seconds)
        self._own: Connection | None = None

    async def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        from mcp import MCPError
        from mcp_types import INVALID_PARAMS

        limit, connection = STEP_SHARE * self.seconds, None
        try:
            async with asyncio.timeout(limit):
                connection = await self._connection()
                self._refuse_changes(connection)
                return _text(await connection.call(name.removeprefix(self.options.prefix), arguments))
        except ToolsChangedError:
            raise
        except Exception as error:
            if isinstance(error, MCPError) and error.code == INVALID_PARAMS:
                return f"error: {error}"
            if connection is not None:  # a server that hangs or has ended does so for the other episodes as well
                connection.retire()
            why = f"{type(error).__name__}: {error}"
            if isinstance(error, TimeoutError):
                why = f"no answer within {limit:g} s, nine tenths of environment.step_timeout_seconds"
            raise EnvironmentFailure(f"mcp: {self.options.where}, call of {name}: {why}") from error

    async def _connection(self) -> Connection:
        if not self.options.per_episode:
            return await self.shared.shared()
        if self._own is None:
            self._own = await self.shared.new()
        return self._own

    def _refuse_changes(self, connection: Connection) -> None:
        known, now = self.shared.tools, connection.tools
        if now is not known and (different := changes(known, now)):
            raise ToolsChangedError(
                f"environment.tools: the tools of {self.options.where} have changed since the run began, and "
                f"its prompts describe the old ones: {different}"
            )

    async def close(self) -> None:
        if self._own is not None:
            await self._own.close()


class Mcp(ToolOptions, ServerOptions):
    kind: Literal["mcp"] = "mcp"
    session: ClassVar[type[Session]] = McpSession
    tools: tuple[str, ...] = ()
    """Which of the server's tools are offered; empty: all. With `name`, their names are prefixed with it and `_`."""
    deterministic: bool = False
    """Declares that equal calls get equal answers."""

    @model_validator(mode="after")
    def _describes_itself(self) -> Self:
        if self.description:
            raise ValueError("description has no effect: the server describes its tools")
        return self

    @property
    def prefix(self) -> str:
        return f"{self.name}_" if self.name else ""

    def names(self) -> tuple[str, ...]:
        return tuple(self.prefix + name for name in self.tools)

    def repeats(self) -> bool:
        return self.deterministic

    def check(self, seconds: float) -> list[str]:
        return [f"mcp: {problem}" for problem in ([] if _installed() else [_LACKING]) + self.problems()]

    async def prepare(self) -> _Server:
        """Start the server. Raises UserError."""
        if not _installed():
            raise UserError(f"mcp: {_LACKING}")
        server = _Server(self)
        await server.start()
        offered = {tool.name for tool in server.tools}
        if lacking := [name for name in self.names() if name not in offered]:
            raise UserError(f"mcp: {self.where} has no tool {', '.join(lacking)}")
        return server

    def offers(self, shared: _Server) -> tuple[Tool, ...]:
        return shared.tools

    def chosen(self, listed: Listed) -> tuple[Tool, ...]:
        """Select the tools to offer. Raises UserError for arguments without a valid JSON schema."""
        names = [name for name in self.tools if name in listed] if self.tools else sorted(listed)
        return tuple(Tool(self.prefix + name, *listed[name], _check(name, listed[name][1])) for name in names)


def _installed() -> bool:
    try:
        return tuple(map(int, metadata.version("mcp").split(".")[:2])) >= _OLDEST
    except (metadata.PackageNotFoundError, ValueError):
        return False


def _check(name: str, schema: dict[str, Any]) -> Callable[[Mapping[str, Any]], str]:
    from jsonschema import SchemaError
    from jsonschema.validators import Draft202012Validator, validator_for
    from jsonschema_specifications import REGISTRY

    kind = validator_for(schema, default=Draft202012Validator)
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        raise UserError(f"the arguments of its tool {name} have no valid JSON schema: {error.message[:200]}") from error
    validator = kind(schema, registry=REGISTRY)  # without a registry it would fetch remote references

    def check(arguments: Mapping[str, Any]) -> str:
        return "; ".join(
            f"{mistake.json_path}: {mistake.message[:200]}" for mistake in validator.iter_errors(arguments)
        )

    return check


def _text(result: CallToolResult) -> str:
    parts = [_part(block) for block in result.content]
    if not parts and result.structured_content is not None:
        parts = [json.dumps(result.structured_content, ensure_ascii=False)]
    text = "\n".join(parts) or "(nothing was returned)"
    return f"error: {text}" if result.is_error else text


def _part(block: Any) -> str:
    """Return a text as it is; for what the policy cannot read, a description."""
    if block.type == "text":
        return str(block.text)
    if block.type in ("image", "audio"):
        return f"({block.type}, {block.mime_type}, {_bytes(block.data)} bytes)"
    if block.type == "resource_link":
        return f"(resource {block.name}: {block.uri})"
    resource = block.resource
    if hasattr(resource, "text"):
        return str(resource.text)
    return f"(resource {resource.uri}, {resource.mime_type}, {_bytes(resource.blob)} bytes)"


def _bytes(base64: str) -> int:
    return len(base64.rstrip("=")) * 3 // 4
