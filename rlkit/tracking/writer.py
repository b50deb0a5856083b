"""A thread that writes in the background of a run, in order; waiting for it has a deadline."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue

from rlkit.experience import UserError

WRITE_SECONDS = 60.0
"""Time limit for one piece of work, once the run waits for it."""

log = logging.getLogger(__name__)


class UnwrittenError(UserError):
    """A disk does not accept what is written."""


class Writer:
    """A daemon thread, so that a hanging disk does not keep the process from ending."""

    def __init__(self, folder: Path, seconds: float = WRITE_SECONDS) -> None:
        self.folder, self.seconds = folder, seconds
        self._open: deque[tuple[str, Future[None]]] = deque()
        self._asked: SimpleQueue[tuple[str, Callable[[], None], Future[None]] | None] = SimpleQueue()
        threading.Thread(target=self._work, name="run-folder", daemon=True).start()

    def put(self, what: str, work: Callable[[], None]) -> None:
        """Queue `work` after everything queued before. Failures are reported."""
        done: Future[None] = Future()
        self._open.append((what, done))
        self._asked.put((what, work, done))

    def unwritten(self) -> str:
        """Describe the pending work, for a message."""
        what = ", ".join(what for what, _ in self._open)
        return f"{what} to be written in {self.folder} (does its disk respond? Repair it, or name another run_dir)"

    async def caught_up(self) -> None:
        """Wait until at most one piece of work is pending."""
        while len(self._open) > 1:
            await asyncio.wait([asyncio.wrap_future(self._open[0][1])])
            self._open.popleft()

    def settle(self) -> None:
        """Wait until no work is pending. If a piece takes longer than `seconds`, give up on all and raise
        UnwrittenError."""
        while self._open:
            try:
                self._open[0][1].result(self.seconds)
            except TimeoutError:
                message = f"waited more than {self.seconds:g} s for {self.unwritten()}"
                self._open.clear()
                raise UnwrittenError(message) from None
            self._open.popleft()

    def close(self) -> None:
        self._asked.put(None)

    def _work(self) -> None:
        while (asked := self._asked.get()) is not None:
            _do(*asked)
            del asked  # a step's groups


def _do(what: str, work: Callable[[], None], done: Future[None]) -> None:
    try:
        work()
    except Exception as error:
        log.warning("not written: %s: %s: %s", what, type(error).__name__, error, exc_info=True)
    finally:
        done.set_result(None)
