"""Run work in a run folder, with a screen, a watchdog and an orderly end. Loads neither Ray nor torch."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import traceback
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from rlkit.cluster.waiting import Watchdog
from rlkit.config.command import FAILED, INTERRUPTED, print_error
from rlkit.config.messages import ConfigError, ConfigIssue
from rlkit.endings import ending
from rlkit.saving import StoppedError
from rlkit.tracking.run_folder import RunFolder
from rlkit.tracking.tracker import Tracker

TERMINATED = 128 + signal.SIGTERM
Work = Callable[[Tracker, contextlib.ExitStack], Coroutine[Any, Any, None]]
"""Called with a stack that is closed once the event loop has ended."""


def supervised(
    folder: RunFolder,
    open_tracker: Callable[[], Tracker],
    report_waits_after: float,
    warnings: Sequence[ConfigIssue],
    work: Work,
) -> int:
    """Run `work`. Returns 0, or prints a message and returns 1 (an error), 130 (Ctrl-C) or 143 (SIGTERM)."""
    try:
        with open_tracker() as tracker:
            for warning in warnings:
                tracker.warn(str(warning))
            watchdog = Watchdog(tracker.message, report_waits_after, folder.logs / "driver.log")
            with watchdog, folder.given_back():
                _to_the_end(work, tracker)
    except (asyncio.CancelledError, KeyboardInterrupt) as stopped:  # SIGTERM, Ctrl-C
        print(ending(stopped, folder), file=sys.stderr)
        return INTERRUPTED if isinstance(stopped, KeyboardInterrupt) else TERMINATED
    except Exception as error:
        with contextlib.suppress(OSError), (folder.logs / "driver.log").open("a") as file:  # the disk may be full
            traceback.print_exception(error, file=file)
        if isinstance(error, ConfigError):
            return print_error(error)
        print(ending(error, folder), file=sys.stderr)
        return FAILED
    return 0


def _to_the_end(work: Work, tracker: Tracker) -> None:
    """Run `work`; raise an actor's own error instead of Ray's, whose message is the actor's whole traceback."""
    try:
        with contextlib.ExitStack() as closing:
            asyncio.run(work(tracker, closing))
    except StoppedError as stopped:
        if stopped.signal is signal.SIGINT:
            raise KeyboardInterrupt from None
        raise asyncio.CancelledError from None
    except Exception as error:
        cause = getattr(error, "cause", None)  # of a RayTaskError
        if isinstance(cause, Exception) and type(error).__module__.startswith("ray."):
            raise cause from error
        raise
