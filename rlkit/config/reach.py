"""Whether somebody listens at an address, asked before anything is loaded."""

from __future__ import annotations

import os
import re
import socket
import tempfile
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

SECONDS = 1.0
"""To connect; a machine that answers at all does so sooner."""


def nobody_at(url: str) -> str | None:
    """Why no connection to the server of `url` comes about; None if one does, or if a proxy stands between."""
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
    """What keeps a TCP connection from coming about."""
    try:
        socket.create_connection((host, port), SECONDS).close()
    except OSError as error:
        return error.strerror or str(error) or type(error).__name__
    return None


def ray_here() -> str | None:
    """HOST:PORT of the Ray that `cluster.address=auto` would join, as Ray looks for it; None if there is none."""
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
        except OSError:  # it ended meanwhile, or is somebody else's
            continue
        if started:
            return started.group(1).decode()
    return None
