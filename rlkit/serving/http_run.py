"""A reward server from its start to its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Iterator

import uvicorn

from rlkit.serving.http_app import RewardServer, make_app
from rlkit.serving.http_config import ResolvedServe
from rlkit.serving.results import RewardFailed

FAILED = 1
KEEP_ALIVE_SECONDS = 60


async def serve(resolved: ResolvedServe, listener: socket.socket) -> int:
    """Load the reward, serve on the bound socket until Ctrl-C or SIGTERM, end everything.

    Returns 0, or 1 if the reward cannot start (the screen says why).
    """
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
    name = resolved.reward["_target_"]
    if resolved.learns:
        print(f"rlkit: {name} learns in a run of its own; served, it stays as it is and only scores", file=sys.stderr)
    print(f"loading {name}", flush=True)
    reward = RewardServer(resolved)
    server = _Server(
        uvicorn.Config(
            make_app(reward),
            log_level="warning",
            access_log=False,
            server_header=False,
            lifespan="off",
            limit_concurrency=resolved.serve.max_connections,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=max(1, round(resolved.serve.end_seconds)),
        )
    )
    ending = _end_on_signals(server)
    try:
        starting = asyncio.ensure_future(reward.queue.start())
        await asyncio.wait({starting, ending}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()  # its processes are killed
            await asyncio.wait({starting})
        else:
            starting.result()
            listener.listen()  # who reads the next line may connect at once, before uvicorn listens
            print(f"serving {name} ({reward.model_version}) on {_address(listener)}", flush=True)
            await server.serve(sockets=[listener])
    except RewardFailed as error:
        print(f"rlkit: {error}", file=sys.stderr)
        return FAILED
    finally:
        await reward.queue.close()
    print("ended", flush=True)
    return 0


class _Server(uvicorn.Server):
    """Signals are handled here, also while the reward loads; uvicorn would raise them once more at its end."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _end_on_signals(server: _Server) -> asyncio.Future[None]:
    """Done at the first signal, which lets open requests finish; a second Ctrl-C does not."""
    loop = asyncio.get_running_loop()
    asked: asyncio.Future[None] = loop.create_future()

    def end() -> None:
        server.force_exit = server.should_exit
        server.should_exit = True
        if not asked.done():
            asked.set_result(None)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, end)
    return asked


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
