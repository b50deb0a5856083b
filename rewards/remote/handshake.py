"""What a reward server says about itself: asked before a run starts, and again by every worker."""

from __future__ import annotations

import os
import ssl
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from rlkit.experience import UserError
from rlkit.experience.wire import HEALTH_PATH, SCHEMA_VERSION, Health

if TYPE_CHECKING:
    import httpx

CONNECT_SECONDS = 5.0
"""A server that does not take a connection within this time is not there."""
ANSWER_SECONDS = 10.0
REMEMBERED_SECONDS = 10.0
"""Checks of one configuration ask several times; one answer serves them all."""
SHOWN = 300
"""Characters of an answer that messages quote."""

_remembered: dict[tuple[str, str | None], tuple[float, Health | HandshakeError]] = {}


class HandshakeError(UserError):
    """There is no server that can be used; the message names it and the remedy."""

    def __init__(self, message: str, may_pass: bool = False) -> None:
        super().__init__(message)
        self.may_pass = may_pass
        """Whether it may be there in a moment."""


def url_problem(url: str) -> str | None:
    """What is wrong with the address of a server, if anything is."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return f"reward.url={url}: must be http://HOST:PORT or https://HOST:PORT"
    if parts.username or parts.password or parts.query or parts.fragment:
        return "reward.url: an address only; a secret belongs into the variable that reward.token_env names"
    return None


def token_from(variable: str | None) -> str | None:
    """The token in an environment variable, None if none is named. Raises HandshakeError if it is not set."""
    if variable is None:
        return None
    token = os.environ.get(variable, "").strip()
    if not token:
        raise HandshakeError(
            f"reward.token_env={variable}: the environment of this process has no {variable}; "
            f"`export {variable}=...` before the start (and, for a Ray that runs already, on its machines)"
        )
    return token


def transport(token: str | None) -> dict[str, Any]:
    """Options of every httpx client here. Proxies of the environment are for the web, not for a reward server."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return {"headers": headers, "trust_env": False, "verify": ssl.create_default_context(), "follow_redirects": False}


def describe(url: str, token: str | None) -> Health:
    """What the server at `url` says about itself. Raises HandshakeError."""
    import httpx

    try:
        with httpx.Client(timeout=httpx.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS), **transport(token)) as client:
            answer = client.get(url.rstrip("/") + HEALTH_PATH)
    except httpx.HTTPError as error:
        raise HandshakeError(
            f"reward.url={url}: no reward server answers there ({type(error).__name__}: {error}); start one with "
            "`python -m rlkit.serve reward=...`",
            may_pass=True,
        ) from error
    return _read(url, answer)


def describe_once(url: str, token: str | None) -> Health:
    """`describe`, remembered for a few seconds. Raises HandshakeError."""
    now = time.monotonic()
    at, outcome = _remembered.get((url, token), (-REMEMBERED_SECONDS, None))
    if outcome is None or now - at >= REMEMBERED_SECONDS:
        try:
            outcome = describe(url, token)
        except HandshakeError as error:
            outcome = error
        _remembered[url, token] = (time.monotonic(), outcome)
    if isinstance(outcome, HandshakeError):
        raise outcome
    return outcome


def _read(url: str, answer: httpx.Response) -> Health:
    said = f"HTTP {answer.status_code}: {answer.text[:SHOWN]}"
    if answer.status_code == 401:
        raise HandshakeError(
            f"reward.url={url}: the server wants a token, and this one is not right; name the environment variable "
            "that holds it with reward.token_env=VARIABLE"
        )
    if answer.status_code not in (200, 503):
        raise HandshakeError(f"reward.url={url}: this is no reward server ({said})", answer.status_code >= 500)
    try:
        content = answer.json()
        version = content["schema_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise HandshakeError(
            f"reward.url={url}: this is no reward server ({said})", answer.status_code == 503
        ) from error
    if version != SCHEMA_VERSION:
        raise HandshakeError(
            f"reward.url={url}: the server (rlkit {content.get('rlkit_version')}) speaks version {version} of the "
            f"messages, this client {SCHEMA_VERSION}; install the same rlkit on both sides"
        )
    try:
        health = Health.model_validate_json(answer.content)
    except ValueError as error:
        raise HandshakeError(f"reward.url={url}: /health is not as its schema says: {error}") from error
    if health.status != "ok":
        raise HandshakeError(f"reward.url={url}: the served reward {health.reward} is down; see its log", may_pass=True)
    return health
