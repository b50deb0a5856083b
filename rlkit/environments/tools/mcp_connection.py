"""Sessions with a Model Context Protocol server, using its official SDK, which is only imported when one starts."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from rlkit.environments.tool import Tool
from rlkit.environments.tools.base import LocalPath
from rlkit.experience import UserError
from rlkit.experience.section import Section

if TYPE_CHECKING:  # optional, and takes seconds to import
    from mcp import Client
    from mcp_types import CallToolResult

log = logging.getLogger(__name__)

_GUARD = str(Path(__file__).with_name("guard.py"))
_CONNECT_SECONDS = 10.0
_LARGEST_EVENT = 64 * 2**20
"""Maximum bytes of a result over HTTP."""


class ServerOptions(Section):
    """Where a server is."""

    command: tuple[str, ...] = ()
    """Command that starts the server, which communicates over its standard input and output."""
    folder: LocalPath = Field(default=Path(), validate_default=True)
    """Working folder of `command`; by default, where the run was started."""
    variables: tuple[str, ...] = ()
    """Environment variables that the command gets, besides HOME, PATH and the like."""
    url: str | None = None
    """Instead of a command: the address of a running server, e.g. http://127.0.0.1:8000/mcp (streamable HTTP)."""
    token_variable: str | None = None
    """Environment variable with the bearer token of `url`."""
    header_variables: Mapping[str, str] = Field(default_factory=dict)
    """Further headers for `url`: name -> environment variable that holds the value."""
    per_episode: bool = False
    """Use a separate session for each episode, for servers that keep state; with a command, a separate process.
    Otherwise the episodes in each process of the environment share a session."""

    @model_validator(mode="after")
    def _one_way_to_a_server(self) -> Self:
        if (self.url is None) == (not self.command):
            raise ValueError("needs command, which starts a server, or url, the address of one (not both)")
        how, foreign = ("url", ("variables",)) if self.url else ("command", ("token_variable", "header_variables"))
        if idle := [name for name in foreign if getattr(self, name)]:
            raise ValueError(f"{', '.join(idle)} has no effect with {how}")
        if self.url is not None:
            address = urlsplit(self.url)
            if address.scheme not in ("http", "https") or not address.hostname:
                raise ValueError(f"url must be an address like http://127.0.0.1:8000/mcp, not {self.url!r}")
            if address.username or address.password:
                raise ValueError("url must be only an address; a secret belongs in the variable of token_variable")
        return self

    @property
    def where(self) -> str:
        return self.url or " ".join(self.command)

    def problems(self) -> list[str]:
        problems = []
        if self.command:
            if not self.folder.is_dir():
                problems.append(f"there is no folder {self.folder}")
            program = self.command[0]
            if shutil.which(str(self.folder / program) if "/" in program else program) is None:
                problems.append(f"there is no program {program} to start the server")
        variables = (*self.variables, *self.header_variables.values(), *filter(None, [self.token_variable]))
        unset = [name for name in variables if not os.environ.get(name)]
        return problems + [f"the environment variable {name} is not set" for name in unset]

    def headers(self) -> dict[str, str]:
        headers = {header: os.environ.get(name, "") for header, name in self.header_variables.items()}
        if self.token_variable is not None:
            headers["Authorization"] = f"Bearer {os.environ.get(self.token_variable, '')}"
        return headers


class ConnectionFailed(Exception):
    """The server cannot be reached, or does not follow the protocol."""


Listed = Mapping[str, tuple[str, dict[str, Any]]]
"""A server's tools: name -> description and JSON schema of the arguments."""


class Connection:
    """A session. One task opens and closes it, because the SDK's task groups must be left where they were entered."""

    def __init__(self, options: ServerOptions, choose: Callable[[Listed], tuple[Tool, ...]]) -> None:
        """`choose`: selects what is offered of a server's tools; may raise UserError."""
        self.options, self._choose = options, choose
        self.tools: tuple[Tool, ...] = ()
        """Replaced when the server says that they have changed."""
        self.retired = False
        """Whether it takes no new calls."""
        self._calls = 0
        """Number of calls in progress."""
        self._client: Client | None = None
        self._changed, self._ending = False, False
        self._news = asyncio.Event()
        """Set whenever `_changed` or `_ending` is set."""
        self._task: asyncio.Task[None] | None = None
        self._session_id: str | None = None
        """Over HTTP, if the server keeps sessions."""

    async def open(self) -> None:
        """Open the session. Raises ConnectionFailed or UserError."""
        ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._live(ready))
        try:
            await ready
        except asyncio.CancelledError:
            self._task.cancel()
            raise

    async def close(self) -> None:
        self._end()
        if self._task is not None:
            await asyncio.wait([self._task])

    def retire(self) -> None:
        """End the session once the calls in progress have their answers."""
        self.retired = True
        if not self._calls:
            self._end()

    async def call(self, name: str, arguments: Mapping[str, Any]) -> CallToolResult:
        """Call a tool. Raises ConnectionFailed, mcp.MCPError, or whatever the SDK raises if a server misbehaves."""
        if self._client is None:
            raise ConnectionFailed("its session has ended")
        self._calls += 1
        try:
            return await self._client.call_tool(name, dict(arguments))
        finally:
            self._calls -= 1
            if self.retired:
                self.retire()

    def _end(self) -> None:
        self._ending = self.retired = True
        self._news.set()

    async def _live(self, ready: asyncio.Future[None]) -> None:
        try:
            async with AsyncExitStack() as stack:
                client = await self._enter(stack)
                self.tools = await self._listed(client)
                self._client = client
                if not ready.done():
                    ready.set_result(None)
                while not self._ending:
                    await self._news.wait()
                    self._news.clear()
                    if self._changed and not self._ending:
                        self._changed = False
                        self.tools = await self._listed(client)
        except Exception as error:
            if ready.done():
                log.warning("the session with %s ended", self.options.where, exc_info=True)
            else:
                ready.set_exception(_cause(error))
        finally:
            self._client, self.retired = None, True
            if not ready.done():
                ready.cancel()

    async def _enter(self, stack: AsyncExitStack) -> Client:
        from mcp import Client
        from mcp_types.version import MODERN_PROTOCOL_VERSIONS

        # Newer protocol versions have no sessions over HTTP, which would hold an episode's state.
        needs_session = self.options.url is not None and self.options.per_episode
        mode = "legacy" if needs_session else "auto"
        client = Client(self._transport(stack), mode=mode, message_handler=self._heard, cache=None)
        await stack.enter_async_context(client)
        if needs_session and self._session_id is None:
            raise UserError(f"per_episode has no effect: {self.options.where} keeps no sessions")
        offered = client.server_capabilities.tools
        if client.protocol_version in MODERN_PROTOCOL_VERSIONS and offered is not None and offered.list_changed:
            await stack.enter_async_context(client.listen(tools_list_changed=True))
        return client

    def _transport(self, stack: AsyncExitStack) -> Any:
        options = self.options
        if options.url is None:
            from mcp import StdioServerParameters, stdio_client

            server = StdioServerParameters(
                command=sys.executable,
                args=["-I", "-S", _GUARD, str(os.getpid()), *options.command],
                env={name: os.environ[name] for name in options.variables if name in os.environ},
                cwd=options.folder,
                encoding_error_handler="replace",
            )
            assert sys.__stderr__ is not None
            return stdio_client(server, errlog=sys.__stderr__)
        import httpx2
        from mcp.client.streamable_http import streamable_http_client

        async def remember(response: httpx2.Response) -> None:
            self._session_id = response.headers.get("mcp-session-id", self._session_id)

        http = httpx2.AsyncClient(
            headers=options.headers(),
            timeout=httpx2.Timeout(None, connect=_CONNECT_SECONDS),  # the caller has a deadline
            limits=httpx2.Limits(max_connections=None),
            event_hooks={"response": [remember]},
        )
        stack.push_async_callback(http.aclose)
        return streamable_http_client(options.url, http_client=http, max_sse_event_size=_LARGEST_EVENT)

    async def _heard(self, message: object) -> None:
        from mcp_types import ToolListChangedNotification

        if isinstance(message, ToolListChangedNotification):
            self._changed = True
            self._news.set()

    async def _listed(self, client: Client) -> tuple[Tool, ...]:
        page = await client.list_tools()
        tools = page.tools
        while page.next_cursor:
            page = await client.list_tools(cursor=page.next_cursor)
            tools += page.tools
        return self._choose({tool.name: (tool.description or "", tool.input_schema) for tool in tools})


def _cause(error: Exception) -> Exception:
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error if isinstance(error, UserError) else ConnectionFailed(f"{type(error).__name__}: {error}")
