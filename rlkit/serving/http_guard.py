"""Who may ask a reward server, and how much at a time: decided before anything of a body is read."""

from __future__ import annotations

import json
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.exceptions import HTTPException

from rlkit.serving.http_config import is_loopback

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Guard:
    """ASGI middleware: a token if there is one, else only names of this machine; JSON; bodies of a bounded size."""

    def __init__(self, app: App, token: str | None, max_body_bytes: int) -> None:
        self.app, self.max_body_bytes = app, max_body_bytes
        self._token = None if token is None else token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 401, 403, 413 or 415, or pass the request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        problem = self._problem(scope["method"], headers)
        if problem is not None:
            await answer(send, *problem)
            return
        await self.app(scope, self._counted(receive), send)

    def _problem(self, method: str, headers: dict[bytes, bytes]) -> tuple[int, str] | None:
        if self._token is not None:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not secrets.compare_digest(given.strip(), self._token):
                return 401, "this server wants its token: Authorization: Bearer ..."
        elif not is_loopback(_host_name(headers.get(b"host", b""))):
            # A web page whose name was made to point at 127.0.0.1 would be let in by the browser.
            return 403, "without a token this server answers only to localhost and loopback addresses"
        if method != "POST":
            return None
        if headers.get(b"content-type", b"").partition(b";")[0].strip().lower() != b"application/json":
            return 415, "this server reads application/json"
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self.max_body_bytes:
            return self._too_large()
        return None

    def _too_large(self) -> tuple[int, str]:
        return 413, f"a request has at most {self.max_body_bytes} bytes (serve.max_body_mib); send fewer groups at once"

    def _counted(self, receive: Receive) -> Receive:
        """Bodies without Content-Length are counted while they come."""
        size = 0

        async def counted() -> MutableMapping[str, Any]:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.max_body_bytes:
                raise HTTPException(*self._too_large())  # from inside the route, whose framework answers it
            return message

        return counted


async def answer(send: Send, status: int, error: str) -> None:
    """An error as JSON. The connection is closed: what was left of the body is not read."""
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers.append((b"connection", b"close"))
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _host_name(host: bytes) -> str:
    """`localhost:8000` -> `localhost`, `[::1]:8000` -> `::1`."""
    text = host.decode("latin-1")
    return text[1:].partition("]")[0] if text.startswith("[") else text.partition(":")[0]
