"""Checks whether a server listens at an address, before anything is loaded."""

from __future__ import annotations

import os
import re
import socket
import tempfile
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

SECONDS = 1.0
"""Timeout for a connection; a machine that answers at all does so sooner."""


def nobody_at(url: str) -> str | None:
    """Return why the server at `url` cannot be reached; None if it can, or if a proxy is in between."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    if parts.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(host):
        return None
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as error:
        return str(error)
    return refusal(host, port)


def refusal(host: str, port: int) -> str | None:
    """Return why a TCP connection fails, or None."""
    try:
        socket.create_connection((host, port), SECONDS).close()
    except OSError as error:
        return error.strerror or str(error) or type(error).__name__
    return None


def ray_here() -> str | None:
    """Return HOST:PORT of the Ray that `cluster.address=auto` would join, found as Ray finds it; None without one."""
    named = os.environ.get("RAY_ADDRESS", "")
    if re.fullmatch(r"[\w.:\[\]-]+:\d+", named):
        return named
    note = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()) / "ray/ray_current_cluster"
    for place in (note, Path("/tmp/ray/ray_current_cluster")):
        if place.is_file():
            return place.read_text().strip()
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            started = re.search(rb"--gcs-address=([\w.:\[\]-]+:\d+)", process.read_bytes())
        except OSError:  # it has ended, or is another user's
            continue
        if started:
            return started.group(1).decode()
    return None
