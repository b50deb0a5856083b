"""The interface of sandboxes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

from rlkit.experience import UserError

Job = dict[str, Any]


class Unavailable(UserError):
    """The sandbox does not work; the message gives the cause and the remedy."""


@dataclass(frozen=True)
class Limits:
    wall_seconds: float
    cpu_seconds: int
    memory_mib: int
    """Address space of each process."""
    processes: int
    """Concurrent processes and threads."""
    file_mib: int
    """Size of each file, and of all files together."""
    output_kib: int
    """Limit on what is read from standard output, and from standard error."""


@dataclass(frozen=True)
class Run:
    ended: Literal["exit", "timeout", "output"]
    """How it ended: by itself or by a crash; at the deadline or out of CPU time; for writing too much."""
    exit_code: int | None
    """None if it was killed here, or if the tests that use it ended later."""
    stdout: bytes
    stderr: str
    results: tuple[Any, ...] = ()
    """Messages of the inner process after the first one (`ready`)."""


class Isolation(ABC):
    """Runs untrusted code. All methods except start and close are thread-safe."""

    @abstractmethod
    def start(self) -> None:
        """Verify that it runs code and isolates it; raise Unavailable if not."""

    @abstractmethod
    def close(self) -> None:
        """Release everything; may be called twice, and without `start`."""

    @abstractmethod
    def run_program(self, code: str, stdin: str, deadline: float) -> Run:
        """Run a program. `deadline` is on `time.monotonic()`, as in all methods.

        Raise Unavailable if it could not run, TimeoutError if `deadline` comes before the code's own deadline.
        """

    @abstractmethod
    def run_calls(self, job: Job, deadline: float) -> Run: ...

    @abstractmethod
    def run_tests(self, solution: Job, tests: Job, deadline: float) -> Run:
        """Run tests and their solution in isolation from each other; see `inside.tester.run_tests`."""

    def check(self) -> None:
        self.start()
