"""Delivers what a run reports to its trackers, so that none of them can end or slow down the run."""

from __future__ import annotations

import importlib
import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from rlkit.trackers.base import Level, RunTracker, Started, Status, TrackerConfig
from rlkit.trackers.known import tracker_class
from rlkit.trackers.ledger import Ledger
from rlkit.trackers.rows import best_and_worst

WAITING = 1000
"""Most calls that may wait for a tracker; further ones are dropped and counted."""
TEXTS_WAITING = 100
"""Samples are dropped when more calls than this are waiting."""
CLOSE_SECONDS = 60.0
"""Time limit for all trackers together to send the rest at the end of a run."""
EARLY_CLOSE_SECONDS = 10.0
"""The same after a signal, whose sender is waiting."""
EXIT_SECONDS = 10.0
"""Time after which the process ends even if a tracker that missed the limit would hold it up."""
LEDGER_SECONDS = 10.0
ALERTS, ALERT_SECONDS = 10, 600.0
"""Most alerts sent within this time; warnings are always shown on the screen."""

Say = Callable[[str], None]


class Delivery:
    """One tracker and its thread."""

    def __init__(self, name: str, tracker: RunTracker, ledger: Ledger, say: Say, start: tuple[Any, ...]) -> None:
        self.name, self.sample_groups = name, tracker.config.sample_groups
        self.dropped = self.calls = self.failed = 0
        self._tracker, self._ledger, self._tell = tracker, ledger, say
        self._started: Started | None = None
        self._until = ledger.until(name)
        self._lost = self._until if ledger.lost(name) else math.inf
        """Time of the first record that the tracker lacks."""
        self._noted = 0.0
        self._queue: deque[tuple[str, tuple[Any, ...]]] = deque()
        self._filled = threading.Condition()
        self._speaks = True
        self._thread = threading.Thread(target=self._work, args=(start,), name=f"tracker {name}", daemon=True)
        self._thread.start()

    def put(self, method: str, *arguments: Any) -> None:
        """Queue a call of the tracker's `method`, if there is room."""
        with self._filled:
            self.calls += 1
            if len(self._queue) >= (TEXTS_WAITING if method == "samples" else WAITING):
                self.dropped += 1
                self._lose(method, arguments)
                first = self.dropped == 1
            else:
                self._queue.append((method, arguments))
                self._filled.notify()
                return
        if first:
            self._say(f"cannot keep up ({len(self._queue)} calls are waiting): it will lack some numbers or texts")

    def end(self, status: Status) -> None:
        with self._filled:
            self._queue.append(("close", (status,)))
            self._filled.notify()

    def ended(self, seconds: float) -> bool:
        """Wait for the thread; return whether it has ended."""
        self._thread.join(max(0.0, seconds))
        return not self._thread.is_alive()

    def leave(self) -> None:
        """Abandon the thread: it may hang for ever, but reports nothing more."""
        with self._filled:
            left = len(self._queue)
        self._say(f"is left behind: it has not sent everything ({left} calls) in time")
        self._speaks = False

    def _work(self, start: tuple[Any, ...]) -> None:
        started = self._call("start", start)
        if isinstance(started, Started):
            self._started = started
            self._note(started)  # at once, so that a killed run is found again, too
            if started.where:
                self._say(started.where)
        elif not self.failed:
            self._say(f"does not take part in this run: start() returned {started!r}, not a Started")
        while True:
            with self._filled:
                self._filled.wait_for(lambda: self._queue)
                method, arguments = self._queue.popleft()
            if self._started is not None:
                self._call(method, arguments)
                if method == "scalars" and arguments[2] < self._lost:
                    self._until = max(self._until, arguments[2])
                if method == "close" or time.monotonic() - self._noted > LEDGER_SECONDS:
                    self._note(self._started)
                    self._noted = time.monotonic()
            if method == "close":
                break
        if self._started is not None and self.dropped + self.failed:
            self._say(f"of {self.calls} calls {self.dropped} were dropped and {self.failed} failed")

    def _call(self, method: str, arguments: tuple[Any, ...]) -> Any:
        try:
            return getattr(self._tracker, method)(*arguments)
        except BaseException as error:  # also if a package calls sys.exit, which must end only this thread
            self.failed += 1
            self._lose(method, arguments)
            if self.failed == 1:
                left_out = " without it" if method == "start" else ""
                self._say(f"{method} failed: {type(error).__name__}: {error}; the run continues{left_out}")
            return None

    def _lose(self, method: str, arguments: tuple[Any, ...]) -> None:
        """Note a missing record, from which on `rlkit sync` must send everything again."""
        if method == "scalars":
            with self._filled:
                self._lost = min(self._lost, arguments[2])

    def _note(self, started: Started) -> None:
        self._ledger.write(self.name, started, self._until, lost=self._lost < math.inf)

    def _say(self, text: str) -> None:
        if self._speaks:
            self._tell(f"tracker {self.name}: {text}")


class Deliveries:
    """All trackers of a run."""

    def __init__(self, configs: Sequence[TrackerConfig], folder: Path, first_step: int, say: Say) -> None:
        """`folder` holds the run's config.yaml; `say` shows a text to the user, from any thread."""
        self._say, self._ledger, self._closed = say, Ledger(folder), False
        self._alerts: deque[float] = deque(maxlen=ALERTS)
        self._deliveries: list[Delivery] = []
        file = folder / "config.yaml"
        settings = yaml.safe_load(file.read_text()) if configs and file.exists() else {}
        for config in configs:
            name = config.name
            try:
                tracker = make_tracker(config)
            except Exception as error:
                say(f"tracker {name}: does not take part in this run: {type(error).__name__}: {error}")
                continue
            start = (settings, folder.name, folder, self._ledger.id_of(name), first_step)
            self._deliveries.append(Delivery(name, tracker, self._ledger, say, start))

    def scalars(self, step: int, values: Mapping[str, float], at: float) -> None:
        for delivery in self._deliveries:
            delivery.put("scalars", step, values, at)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        for delivery in self._deliveries:
            if chosen := best_and_worst(rows, delivery.sample_groups):
                delivery.put("samples", step, chosen)

    def alert(self, level: Level, title: str, text: str) -> None:
        now = time.monotonic()
        if len(self._alerts) == ALERTS and now - self._alerts[0] < ALERT_SECONDS:
            return
        self._alerts.append(now)
        for delivery in self._deliveries:
            delivery.put("alert", level, title, text)

    def close(self, status: Status) -> None:
        """Wait for all trackers, but not for long; may be called again."""
        if self._closed:
            return
        self._closed = True
        seconds = EARLY_CLOSE_SECONDS if status == "stopped" else CLOSE_SECONDS
        deadline = time.monotonic() + seconds
        for delivery in self._deliveries:
            delivery.end(status)
        patience = time.monotonic() + min(2.0, seconds)
        slow = [one.name for one in self._deliveries if not one.ended(patience - time.monotonic())]
        if slow:
            self._say(f"waiting for {', '.join(slow)} to send what is left, at most {seconds:g} s")
        late = [one for one in self._deliveries if not one.ended(deadline - time.monotonic())]
        for delivery in late:
            delivery.leave()
        if late:
            code = 0 if status == "finished" else 1
            threading.Thread(target=_end_with_the_program, args=(code,), daemon=True).start()


def make_tracker(config: TrackerConfig) -> RunTracker:
    """Make a tracker and import its package first: two threads that import at once may see half-initialised modules."""
    cls = tracker_class(config.kind)
    for module in cls.modules:
        importlib.import_module(module)
    return cls(config)


def _end_with_the_program(code: int) -> None:
    """End the process: a package's exit handlers may hang just like its calls."""
    threading.main_thread().join()
    time.sleep(EXIT_SECONDS)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
