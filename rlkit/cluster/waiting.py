"""Waiting for another process: every wait is listed while it lasts, and has a deadline and a name.

async with waiting("step 3", lambda: f"rollout worker 1: {len(left)} groups", 1800, "trainer.step_timeout_seconds"):
    ...

While a Watchdog is open, long waits are reported before their deadline, together with all other open waits in one line.
"""

from __future__ import annotations

import asyncio
import faulthandler
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from rlkit.experience import UserError

TICK_SECONDS = 0.5
"""How often the watchdog checks the open waits."""
GRACE_SECONDS = 60.0
"""A wait still open this long after its deadline cannot be cancelled, so its process is ended."""
REPORT_SECONDS = 5.0
"""How long writing a report may take; the watchdog continues without it."""
NEARLY_DUE = 0.9
"""Waits past this share of their due time count as reported with the others."""


@dataclass(eq=False)
class Wait:
    who: str
    what: str | Callable[[], str]
    """A function is called for every report, possibly from the watchdog's thread."""
    seconds: float
    """Its deadline, counted from `began`."""
    limit: str
    """The configuration key that sets the deadline."""
    cancels: bool = True
    """Whether the event loop ends it at its deadline."""
    began: float = field(default_factory=time.monotonic)
    reported: float = 0.0
    """Seconds that it had lasted at its last report."""

    @property
    def waited_for(self) -> str:
        if isinstance(self.what, str):
            return self.what
        try:
            return self.what()
        except Exception as error:  # a failing description must not keep the deadline from acting
            return f"something that cannot be described ({type(error).__name__}: {error})"

    @property
    def lasted(self) -> float:
        return time.monotonic() - self.began

    def __str__(self) -> str:
        lasted = f"{self.lasted:.3g}" if self.lasted < 100 else f"{self.lasted:.0f}"
        return f"{self.who} for {self.waited_for} ({lasted} of {self.seconds:g} s, {self.limit})"


class WaitedTooLongError(UserError):
    """Raised when a deadline has passed; the message says who waited for what, and which other waits were open."""


_open: dict[Wait, None] = {}
"""This process's open waits, oldest first. (Single operations on a dictionary need no lock.)"""


def open_waits() -> list[Wait]:
    return list(_open)


@asynccontextmanager
async def waiting(who: str, what: str | Callable[[], str], seconds: float, limit: str) -> AsyncIterator[None]:
    """Raise WaitedTooLongError if the body takes longer than `seconds`, the value of the configuration key `limit`.

    A TimeoutError from inside passes through.
    """
    wait, timeout, loop = Wait(who, what, seconds, limit), asyncio.timeout(None), asyncio.get_running_loop()
    message = ""

    def expire() -> None:
        nonlocal message
        timeout.reschedule(loop.time())
        message = f"{who} waited more than {limit}={seconds:g} s for {wait.waited_for}"
        # Listed now, before the inner waits are cancelled in the loop's next iteration.
        others = "; ".join(str(other) for other in _open if other is not wait)
        message += f". Waiting at that moment: {others}" if others else ""

    timer = loop.call_later(seconds, expire)
    _open[wait] = None
    try:
        async with timeout:
            yield
    except TimeoutError:
        if not timeout.expired():
            raise
        raise WaitedTooLongError(message) from None
    finally:
        timer.cancel()
        del _open[wait]


@contextmanager
def blocking(who: str, what: str, seconds: float, limit: str) -> Iterator[None]:
    """List a library call, which cannot be cancelled, as a wait: at its deadline an open Watchdog ends the process."""
    wait = Wait(who, what, seconds, limit, cancels=False)
    _open[wait] = None
    try:
        yield
    finally:
        del _open[wait]


class Watchdog:
    """A thread that reports waits past a `share` of their deadline, then again at each doubling."""

    def __init__(self, say: Callable[[str], None], share: float, stacks: Path, exit_code: int = 1) -> None:
        """`say` is called from another thread. `stacks`: file for the stacks of a process that must be ended."""
        self._say, self._share, self._stacks, self._exit_code = say, share, stacks, exit_code
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        self._thread.join(timeout=5)

    def _watch(self) -> None:
        while not self._closed.wait(TICK_SECONDS):
            waits = open_waits()
            for wait in waits:
                if wait.lasted > wait.seconds + (GRACE_SECONDS if wait.cancels else 0.0):
                    self._end(wait, waits)
            if any(wait.lasted >= self._due(wait) for wait in waits):
                self._report("still waiting: " + "; ".join(map(str, waits)))
                for wait in waits:
                    if wait.lasted >= NEARLY_DUE * self._due(wait):
                        wait.reported = wait.lasted

    def _due(self, wait: Wait) -> float:
        return max(self._share * wait.seconds, 2 * wait.reported)

    def _report(self, line: str) -> None:
        """Report in another thread: no deadline may depend on a screen that is closed or blocks."""
        thread = threading.Thread(target=self._say_or_write, args=(line,), name="watchdog-report", daemon=True)
        thread.start()
        thread.join(REPORT_SECONDS)

    def _say_or_write(self, line: str) -> None:
        try:
            self._say(line)
        except Exception as error:
            with self._stacks.open("a") as file:
                file.write(f"{line}\n(could not be reported: {type(error).__name__}: {error})\n")

    def _end(self, wait: Wait, waits: list[Wait]) -> None:
        """End the process: the event loop is blocked, or a library call does not return."""
        try:
            with self._stacks.open("a") as file:
                faulthandler.dump_traceback(file=file)
            self._report(
                f"this process hangs and is being ended: {wait}. Waiting at that moment: "
                f"{'; '.join(map(str, waits))}. The stacks of its threads are in {self._stacks}"
            )
        finally:
            os._exit(self._exit_code)
