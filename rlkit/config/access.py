"""Access to a server: addresses of this machine, names in a Host header, tokens."""

from __future__ import annotations

import ipaddress
import secrets

LEAST_TOKEN_CHARACTERS = 16


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens on `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def host_name(header: str) -> str:
    """Return the host name in a Host header, without its port."""
    return header[1:].partition("]")[0] if header.startswith("[") else header.partition(":")[0]


def same_token(given: str, token: str) -> bool:
    """Compare in constant time, so that the duration does not reveal where the two differ."""
    return secrets.compare_digest(given.encode(), token.encode())


def token_problem(token: str) -> str | None:
    """Return why a token is not acceptable, or None."""
    if len(token) >= LEAST_TOKEN_CHARACTERS and token.isascii():
        return None
    remedy = 'python -c "import secrets; print(secrets.token_urlsafe())" makes a good one'
    return f"the token must have at least {LEAST_TOKEN_CHARACTERS} ASCII characters; {remedy}"
