"""Judging untrusted text in processes that are killed and replaced when they hang, grow or die."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from typing import Any, TypeVar

from pebble import ProcessExpired, ProcessPool

Item = TypeVar("Item")
Result = TypeVar("Result")

ITEMS_PER_TASK = 16
"""Items sent to a process at once: a round trip costs about as much as a verdict."""

_BUDGET_USED_UP = "timeout: the verifier's time for this call was used up"


@dataclass(frozen=True, slots=True)
class Failed:
    """Why an item has no result: `timeout: ...` or `crash: ...`."""

    reason: str


class Processes:
    """A pool whose processes start when they are first needed.

    `prepare(*prepare_arguments)` runs in each new process before any deadline; `preload` are the modules that the
    fork server imports once for all (those of the first pool of this process count).
    """

    def __init__(
        self, count: int, prepare: Callable[..., None], preload: Sequence[str], prepare_arguments: Sequence[Any] = ()
    ) -> None:
        self._count = count
        self._prepare = prepare
        self._prepare_arguments = tuple(prepare_arguments)
        self._preload = list(preload)
        self._pool: ProcessPool | None = None

    def map(
        self,
        function: Callable[[Sequence[Item]], list[Result]],
        items: Sequence[Item],
        deadline: float,
        item_timeout: float,
    ) -> list[Result | Failed]:
        """`function` on all items, in order, at most until `deadline` (of `time.monotonic`).

        Items go in batches; those of a failed batch go again one by one, so that only the culprit is lost.
        """
        starts = range(0, len(items), ITEMS_PER_TASK)
        batches = [range(start, min(start + ITEMS_PER_TASK, len(items))) for start in starts]
        results, failures = self._run(function, items, batches, deadline, item_timeout)
        again = [range(index, index + 1) for batch, reason in failures if not _final(batch, reason) for index in batch]
        if again:
            late_results, late_failures = self._run(function, items, again, deadline, item_timeout)
            results |= late_results
            failures = [(batch, reason) for batch, reason in failures if _final(batch, reason)] + late_failures
        failed = {index: Failed(reason) for batch, reason in failures for index in batch}
        return [results[index] if index in results else failed[index] for index in range(len(items))]

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.stop()
            self._pool.join(timeout=10)
            self._pool = None

    def _run(
        self,
        function: Callable[[Sequence[Item]], list[Result]],
        items: Sequence[Item],
        batches: Sequence[range],
        deadline: float,
        item_timeout: float,
    ) -> tuple[dict[int, Result], list[tuple[range, str]]]:
        """Results of the batches that came back, and a reason for each that did not."""
        pool = self._open_pool()
        futures = [
            (batch, pool.schedule(function, args=([items[index] for index in batch],), timeout=item_timeout))
            for batch in batches
        ]
        results: dict[int, Result] = {}
        failures: list[tuple[range, str]] = []
        for batch, future in futures:
            try:
                remaining = max(0.0, deadline - time.monotonic())
                results.update(zip(batch, future.result(timeout=remaining), strict=True))
            except FutureTimeoutError:
                if future.done():
                    failures.append((batch, f"timeout: no verdict within {item_timeout:g} s"))
                else:
                    future.cancel()
                    failures.append((batch, _BUDGET_USED_UP))
            except ProcessExpired as error:
                failures.append((batch, f"crash: the verifier process ended with exit code {error.exitcode}"))
            except BrokenExecutor:  # a process died between two tasks; the pool is made anew
                failures.append((batch, "crash: the verifier process died"))
        return results, failures

    def _open_pool(self) -> ProcessPool:
        if self._pool is not None and not self._pool.active:
            self.close()
        if self._pool is None:
            # forkserver: forking the caller would copy its threads' locks, and a spawned child imports all anew.
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(self._preload)
            if "RLKIT_RUN_TOKEN" in os.environ:
                # Ray kills Python's tracker of semaphores with this process; by their name the janitor finds them.
                config = multiprocessing.current_process()._config  # type: ignore[attr-defined]
                config["semprefix"] = f"/rlkit-{os.environ['RLKIT_RUN_TOKEN']}"
            self._pool = ProcessPool(
                max_workers=self._count,
                initializer=self._prepare,
                initargs=self._prepare_arguments,
                context=context,
            )
        return self._pool


def _final(batch: range, reason: str) -> bool:
    """Whether to leave it at that: a single item that hung, or no time left."""
    return reason == _BUDGET_USED_UP or (len(batch) == 1 and reason.startswith("timeout"))
