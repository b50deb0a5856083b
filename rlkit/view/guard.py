"""Access control: answers this server's own pages, and demands a token if others could reach the server."""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import re
import socket
from urllib.parse import parse_qsl, urlencode, urlsplit

from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rlkit.config.access import host_name, is_loopback, same_token

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
"""Headers of every response; the page has its own Content-Security-Policy."""

_ELEMENT = re.compile(r"<(script|style)\b([^>]*)>(.*?)</\1>", re.DOTALL)


class Guard:
    """Checks requests before routing, sets the headers, and drops empty parameters and the token."""

    def __init__(self, app: ASGIApp, host: str, token: str | None) -> None:
        """`host`: the address on which the server listens. If that is all addresses, the names that this machine knows
        for itself and any IP address are accepted, as it seldom knows which one others use. Without a `token`, everyone
        who can reach the server is answered."""
        self._app, self._token = app, token
        self._names, self._everywhere = {host.lower()}, host in ("0.0.0.0", "::", "")
        if self._everywhere:
            self._names |= {socket.gethostname().lower(), socket.getfqdn().lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return  # no web sockets, no lifespan
        keep_token = scope["path"] == "/"
        pairs = [(k, v) for k, v in parse_qsl(scope["query_string"].decode("latin-1")) if keep_token or k != "token"]

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                present = {name.lower() for name, _ in message["headers"]}
                more = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message["headers"], *(pair for pair in more if pair[0] not in present)]
            await send(message)

        app = self._refusal(HTTPConnection(scope), scope["method"]) or self._app
        await app({**scope, "query_string": urlencode(pairs).encode()}, receive, with_headers)

    def _refusal(self, request: HTTPConnection, method: str) -> Response | None:
        if method not in ("GET", "HEAD"):
            return refused(405, "this server answers only GET requests", {"Allow": "GET"})
        header = request.headers.get("host", "")
        name = host_name(header)
        if not (is_loopback(name) or name.lower() in self._names or (self._everywhere and _is_number(name))):
            # A browser would admit a web page whose name was made to point here. An IP address cannot be redirected.
            known = " or ".join(sorted(self._names - {"0.0.0.0", "::", ""}))
            return refused(403, f"this server is not known as {header[:60]!r}: use {known}, or its IP address")
        origin = request.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != header:
            return refused(403, "other pages may not read this server's answers (Origin)")
        foreign = request.headers.get("sec-fetch-site") in ("cross-site", "same-site")
        if foreign and not (request.url.path == "/" and request.headers.get("sec-fetch-mode") == "navigate"):
            return refused(403, "other pages may not read this server's answers (Sec-Fetch-Site)")
        if self._token is not None and not any(same_token(given, self._token) for given in _tokens(request)):
            words = "this server requires its token: open the printed link, or send Authorization: Bearer ..."
            return refused(401, words, {"WWW-Authenticate": "Bearer"})
        return None


def _tokens(request: HTTPConnection) -> list[str]:
    """Return the tokens in a request."""
    scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
    given = request.query_params.getlist("token") + ([bearer] if scheme.lower() == "bearer" else [])
    cookie = request.cookies.get(cookie_name(request))
    return given if cookie is None else [*given, cookie]


def cookie_name(request: HTTPConnection) -> str:
    """Return a name with the port in it, because browsers share cookies between the ports of a host."""
    return f"rlkit_view_{request.url.port or 80}"


def refused(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": message}, status, headers)


def page_policy(page: str, connect: str = "'self'") -> str:
    """Return the Content-Security-Policy that allows a page its own inline scripts and styles and no others."""
    digests: dict[str, list[str]] = {"script": [], "style": []}
    for tag, attributes, text in _ELEMENT.findall(re.sub(r"\r\n?", "\n", page)):  # as a browser hashes them
        if 'type="application/json"' not in attributes:  # data, not a script
            digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            digests[tag].append(f"'sha256-{digest}'")
    allowed = [f"{tag}-src " + (" ".join(own) or "'none'") for tag, own in digests.items()]
    more = ["img-src data:", f"connect-src {connect}", "base-uri 'none'", "form-action 'none'"]
    return "; ".join(["default-src 'none'", *allowed, *more])


def _is_number(name: str) -> bool:
    """Whether a name is an IP address, in the form that `host_name` returns."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
