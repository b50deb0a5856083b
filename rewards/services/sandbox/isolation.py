"""What a caller asks of a sandbox, whichever it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

from rlkit.experience import UserError

Job = dict[str, Any]


class Unavailable(UserError):
    """The sandbox itself does not work: nothing is known about the code. The message names cause and remedy."""


@dataclass(frozen=True)
class Limits:
    """What one run may take."""

    wall_seconds: float
    cpu_seconds: int
    memory_mib: int
    """Address space of each process."""
    processes: int
    """Processes and threads at a time."""
    file_mib: int
    """Size of each file, and of all files together."""
    output_kib: int
    """What is read of standard output, and of standard error."""


@dataclass(frozen=True)
class Run:
    """How a run ended and what it left."""

    ended: Literal["exit", "timeout", "output"]
    """By itself (also: crashed); killed at the deadline or out of CPU time; killed for writing too much."""
    exit_code: int | None
    """None if it was killed here, or lives no longer than the tests that use it."""
    stdout: bytes
    stderr: str
    results: tuple[Any, ...] = ()
    """Messages of the inner process, without the first, which says that it is ready."""


class Isolation(ABC):
    """Runs foreign code. All methods but start and close may be called from several threads."""

    @abstractmethod
    def start(self) -> None:
        """Prove that it runs code, and isolates it. Raises Unavailable with the remedy."""

    @abstractmethod
    def close(self) -> None:
        """Free what it holds. May be called twice, and without start."""

    @abstractmethod
    def run_program(self, code: str, stdin: str, deadline: float) -> Run:
        """A program with its standard input. `deadline` (`time.monotonic()`) holds for all methods.

        Raises Unavailable if it could not be run, TimeoutError if the deadline came before the code's own.
        """

    @abstractmethod
    def run_calls(self, job: Job, deadline: float) -> Run:
        """Calls of a function; see `inside.solution.answer_calls`."""

    @abstractmethod
    def run_tests(self, solution: Job, tests: Job, deadline: float) -> Run:
        """Tests of a solution, the two apart from each other; see `inside.tester.run_tests`."""

    def check(self) -> None:
        """What can be said before a run, quickly. Raises Unavailable with the remedy."""
        self.start()
