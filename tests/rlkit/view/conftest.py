"""Made-up run folders, and the view's server over real HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn
from synthetic_run import make_evaluation, make_run

from rlkit.view.guard import access_for
from rlkit.view.http import make_app
from rlkit.view.runs import Runs

Server = Callable[..., contextlib.AbstractContextManager[httpx.Client]]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Indexes of a test of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`main` (a reward that is fooled, tokens, rescored), `older` (before rows had the newer keys) and two evaluations.
    Tests leave them as they are."""
    root = tmp_path_factory.mktemp("runs")
    make_run(root / "main", 1000, rescored=True)
    make_run(root / "older", 500, seed=3, best_worst=True, tokens=False)
    make_evaluation(root / "first", accuracy=0.4)
    make_evaluation(root / "last", accuracy=0.8)
    return root


@pytest.fixture(scope="session")
def serving() -> Server:
    """Serve runs in a thread of this process: `with serving(runs, token=...) as client`."""
    return _serving


@contextlib.contextmanager
def _serving(runs: Runs, host: str = "127.0.0.1", token: str | None = None) -> Iterator[httpx.Client]:
    ending = threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    config = uvicorn.Config(make_app(runs, access_for(host, token), ending), log_level="warning", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            yield client
    finally:
        ending.set()
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()
