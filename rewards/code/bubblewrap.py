"""Sandboxes on this machine, made by bubblewrap: an own view of the system for every run, gone with it."""

from __future__ import annotations

import json
import os
import queue
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from rewards.code.inside.start import READY
from rewards.code.inside.wire import messages
from rewards.code.isolation import Isolation, Job, Limits, Run, Unavailable
from rewards.code.layout import INSIDE, Layout, is_root
from rewards.code.process import Command, Supervised, supervise
from rewards.code.self_test import SELF_TEST
from rewards.code.user_namespace import make_user_namespace

STARTUP_SECONDS = 30.0
"""By then a sandbox stands, also on a busy machine."""
_SHOWN_CHARACTERS = 2000
_RESULTS_PER_OUTPUT = 4
"""Values and verdicts may take that much more than output: they are written with their types."""
_OUT_OF_CPU_TIME = 128 + signal.SIGXCPU
_REMEDY = (
    "Sandboxes need user namespaces: sysctl -w user.max_user_namespaces=10000 (Debian: kernel.unprivileged_userns_clone"
    "=1; Ubuntu: kernel.apparmor_restrict_unprivileged_userns=0; Docker: --security-opt seccomp=unconfined "
    "--security-opt systempaths=unconfined). Or run a SandboxFusion service and set reward.isolation=http."
)


class Bubblewrap(Isolation):
    """No network, a read-only file system with little more than Python, an empty environment, namespaces of its own.

    >>> sandbox = Bubblewrap(limits, side_by_side=2)
    >>> sandbox.start()
    >>> sandbox.run_program("print(6 * 7)", stdin="", deadline=time.monotonic() + 60).stdout
    b'42\n'
    """

    def __init__(self, limits: Limits, side_by_side: int, python: str | None = None) -> None:
        self._limits, self._side_by_side, self._python = limits, side_by_side, python
        self._slots: queue.Queue[int | None] = queue.Queue()
        self._namespaces: list[int] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def start(self) -> None:
        """Look for the tools, lay out the sandbox, and let a run try what it must not be able to do."""
        self._folder = tempfile.TemporaryDirectory(prefix="rlkit-sandbox-")
        try:
            self._layout = Layout(self._limits, self._python, Path(self._folder.name))
            for _ in range(self._side_by_side):
                if is_root():
                    self._namespaces.append(make_user_namespace())
                self._slots.put(self._namespaces[-1] if is_root() else None)
            self._self_test()
        except Unavailable:
            self.close()
            raise

    def close(self) -> None:
        """Forget namespaces and files; runs end by themselves."""
        while self._namespaces:
            os.close(self._namespaces.pop())
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def run_program(self, code: str, stdin: str, deadline: float) -> Run:
        """A program with its standard input."""
        with _file(stdin.encode()) as standard_input, _file(code.encode()) as source, self._slot(deadline) as slot:
            command = self._command(slot, "program", standard_input, (source,))
            return self._run([command], deadline)

    def run_calls(self, job: Job, deadline: float) -> Run:
        """Calls of a function."""
        with _file(json.dumps(job).encode()) as standard_input, self._slot(deadline) as slot:
            return self._run([self._command(slot, "calls", standard_input)], deadline)

    def run_tests(self, solution: Job, tests: Job, deadline: float) -> Run:
        """Two sandboxes, one for the tests and one for the solution, that share two pipes and nothing else."""
        with (
            _file(json.dumps(solution).encode()) as solution_job,
            _file(json.dumps(tests).encode()) as tests_job,
            self._slot(deadline) as slot,
        ):
            requests_out, requests_in = os.pipe()
            replies_out, replies_in = os.pipe()
            tester = self._command(slot, "tester", tests_job, (requests_in, replies_out))
            code = self._command(slot, "solution", solution_job, (requests_out, replies_in))
            return self._run([tester, code], deadline, (requests_out, requests_in, replies_out, replies_in))

    @contextmanager
    def _slot(self, deadline: float) -> Iterator[int | None]:
        try:
            slot = self._slots.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise TimeoutError("the time for this call ended before a sandbox was free") from None
        try:
            yield slot
        finally:
            self._slots.put(slot)

    def _command(self, slot: int | None, role: str, stdin: int, descriptors: tuple[int, ...] = ()) -> Command:
        def arguments(results: int) -> list[str]:
            numbers = "".join(f", {number}" for number in (results, *descriptors))
            call = f"from rewards.code.inside.start import start; start({role!r}{numbers})"
            return [*self._layout.arguments(slot), f"import sys; sys.path.insert(0, {INSIDE!r}); {call}"]

        return Command(arguments, stdin, descriptors if slot is None else (*descriptors, slot))

    def _run(self, commands: list[Command], deadline: float, pipes: tuple[int, ...] = ()) -> Run:
        try:
            done = supervise(
                commands,
                READY,
                self._limits.wall_seconds,
                STARTUP_SECONDS,
                deadline,
                max_output=self._limits.output_kib * 1024,
                max_results=_RESULTS_PER_OUTPUT * self._limits.output_kib * 1024,
                handed_over=pipes,
            )
        except OSError as error:
            raise Unavailable(f"a sandbox cannot be started: {error}") from error
        return _outcome(done)

    def _self_test(self) -> None:
        job = json.dumps({"processes": self._limits.processes})
        try:
            run = self.run_program(SELF_TEST, job, time.monotonic() + 2 * STARTUP_SECONDS)
        except Unavailable as error:
            raise Unavailable(f"bubblewrap does not work here: {error}\n{_REMEDY}") from error
        leaks = next(messages(run.stdout), None)
        if leaks != []:
            found = "; ".join(leaks) if leaks else f"the self-test failed: {run.stderr.strip()[-500:]}"
            raise Unavailable(f"the sandbox does not isolate: {found}")


def _outcome(done: Supervised) -> Run:
    """What became of the code. Raises Unavailable if it never ran, TimeoutError if the caller's time ended first."""
    if done.ended == "deadline":
        raise TimeoutError("the time for this call ended before the code's own")
    for child in done.children:
        if not child.written["results"].startswith(READY):
            cause = _text(child.written["stderr"]).strip() or f"exit code {child.exit_code} without a message"
            when = f" within {STARTUP_SECONDS:g} s" if done.ended == "startup" else ""
            raise Unavailable(f"a sandbox did not start{when}: {cause}")
    first, code = done.children[0], done.children[-1]
    ended: Literal["exit", "timeout", "output"] = "timeout" if done.ended == "startup" else done.ended
    if code.overflow:
        ended = "output"
    elif code.exit_code == _OUT_OF_CPU_TIME:
        ended = "timeout"
    if done.ended == "exit" and (first.exit_code or 0) < 0:
        raise Unavailable(f"a sandbox was killed from outside (signal {-(first.exit_code or 0)})")
    exit_code = None if (code.exit_code or 0) < 0 else code.exit_code
    results = tuple(messages(bytes(first.written["results"])))[1:]
    return Run(ended, exit_code, bytes(first.written["stdout"]), _text(code.written["stderr"]), results)


def _text(data: bytearray) -> str:
    return bytes(data).decode(errors="replace")[-_SHOWN_CHARACTERS:]


@contextmanager
def _file(content: bytes) -> Iterator[int]:
    """A file descriptor of a file without a name, ready to be read."""
    with open(os.memfd_create("job"), "w+b") as file:  # noqa: PTH123
        file.write(content)
        file.seek(0)
        yield file.fileno()
