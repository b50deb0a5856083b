"""Following a job's log to its end, over dropped connections, without showing a line twice or losing one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from rlkit.jobs.cluster import Cluster, ClusterError, run_name

POLL_SECONDS = 5.0
"""A quiet log: how often the job's state is asked for."""
QUIET_SECONDS = 60.0
"""A log quiet for so long is opened anew: a dead connection looks the same."""
PAUSES = (0.5, 1.0, 2.0, 5.0)
STOPPED = 143
"""Exit code of a job that was stopped: what SIGTERM gives."""

Write = Callable[[str], None]


class LogFollower:
    """One job's log. What was shown is counted in characters, because Ray sends a log from its beginning each time."""

    def __init__(self, cluster: Cluster, job_id: str, write: Write, note: Write, give_up_seconds: float) -> None:
        """`write` gets the log's text as it comes, `note` what happens to the connection."""
        self._cluster, self._job_id, self._write, self._note = cluster, job_id, write, note
        self._give_up = give_up_seconds
        self._shown = 0
        self._skip = 0
        self._answered = time.monotonic()
        self._lost = False

    async def to_the_end(self) -> Any:
        """Show the log until the job has ended; returns Ray's JobDetails.

        Raises ClusterError when there was no answer for `give_up_seconds`.
        """
        failures = 0
        while True:
            try:
                await self._follow_once()
                details = await self._details()
                if details.status.is_terminal():
                    await self._show_rest()
                    return details
                failures = 0
            except _connection_errors() as error:
                await self._wait_after(error, failures)
                failures += 1

    async def _follow_once(self) -> None:
        """Until the connection closes, the job ends, or the log has been quiet for long."""
        self._skip = self._shown
        stream = self._cluster.client.tail_job_logs(self._job_id)
        quiet_since = time.monotonic()
        next_text = asyncio.ensure_future(anext(stream, None))
        try:
            while time.monotonic() - quiet_since < QUIET_SECONDS:
                done, _ = await asyncio.wait({next_text}, timeout=POLL_SECONDS)
                if not done:
                    if (await self._details()).status.is_terminal():
                        return
                    continue
                text = next_text.result()
                if text is None:
                    return
                self._answer()
                self._show(text)
                quiet_since = time.monotonic()
                next_text = asyncio.ensure_future(anext(stream, None))
        finally:
            next_text.cancel()
            await asyncio.gather(next_text, return_exceptions=True)
            await stream.aclose()

    def _show(self, text: str) -> None:
        """Write what is new in `text`, the continuation of what this connection sent before."""
        new = text[self._skip :]
        self._skip -= len(text) - len(new)
        self._shown += len(new)
        if new:
            self._write(new)

    async def _show_rest(self) -> None:
        """Ray closes the connection with the job, which may be before the last lines were sent."""
        whole = await asyncio.to_thread(self._cluster.ask, self._cluster.client.get_job_logs, self._job_id)
        self._skip = self._shown
        self._show(whole)

    async def _details(self) -> Any:
        details = await asyncio.to_thread(self._cluster.ask, self._cluster.client.get_job_info, self._job_id)
        self._answer()
        return details

    def _answer(self) -> None:
        self._answered = time.monotonic()
        if self._lost:
            self._lost = False
            self._note("connected again")

    async def _wait_after(self, error: BaseException, failures: int) -> None:
        silent = time.monotonic() - self._answered
        if silent > self._give_up:
            raise ClusterError(
                f"no answer from {self._cluster.address} for {silent:.0f} s ({error}). The job goes on if the cluster "
                f"lives; follow it again: python -m rlkit.submit logs {self._job_id} "
                f"cluster.address={self._cluster.address}"
            ) from error
        if not self._lost:
            self._lost = True
            self._note(f"connection lost ({type(error).__name__}); the job goes on, trying again")
        await asyncio.sleep(PAUSES[min(failures, len(PAUSES) - 1)])


def follow(cluster: Cluster, job_id: str, write: Write, note: Write, give_up_seconds: float) -> Any:
    """`LogFollower.to_the_end` for a caller without an event loop. KeyboardInterrupt passes through."""
    return asyncio.run(LogFollower(cluster, job_id, write, note, give_up_seconds).to_the_end())


def exit_code(details: Any) -> int:
    """The job's exit code as a shell would give it; 143 if it was stopped, 1 if it never ran."""
    status = details.status.value
    if status == "STOPPED":
        return STOPPED
    if details.driver_exit_code is None:
        return 0 if status == "SUCCEEDED" else 1
    code = int(details.driver_exit_code)
    return code if code >= 0 else 128 - code


def outcome(details: Any) -> str:
    """How the job ended, in a line; with Ray's message if the run never got to say anything itself."""
    seconds = ((details.end_time or 0) - (details.start_time or 0)) / 1000
    took = f"{details.status.value.lower()} after {max(0.0, seconds):.0f} s"
    text = f"{run_name(details)}: {took}, exit code {exit_code(details)}"
    never_ran = details.status.value == "FAILED" and details.driver_exit_code is None
    return f"{text}\n{details.message}" if never_ran else text


def _connection_errors() -> tuple[type[BaseException], ...]:
    import aiohttp

    # Ray reports a connection that broke off as a RuntimeError.
    return (aiohttp.ClientError, OSError, TimeoutError, RuntimeError)  # ClusterError is one, too
