"""From a program and its tests to a verdict, through whichever sandbox."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rewards.code.cases import AssertTests, BadTests, CallTests, InputOutputTests, Tests
from rewards.code.compare import same_output, same_value
from rewards.code.inside.wire import decode
from rewards.code.isolation import Isolation, Run, Unavailable

_SHOWN = 300


@dataclass(frozen=True)
class Verdict:
    """What the tests say about a program."""

    passed: int
    total: int
    timeout: bool
    """It ran into the wall deadline or used up its CPU time."""
    trace: str
    """The first failure, for people."""


class Judge:
    """Judges programs in a sandbox.

    >>> Judge(sandbox, every_test=False, float_tolerance=1e-6).judge("def f(x): return x", tests, deadline)
    Verdict(passed=3, total=3, timeout=False, trace='all 3 tests passed')
    """

    def __init__(self, isolation: Isolation, every_test: bool, float_tolerance: float) -> None:
        """`every_test`: go on after the first failure, where the share of passed tests counts."""
        self._isolation, self._every_test, self._tolerance = isolation, every_test, float_tolerance

    def judge(self, code: str, tests: Tests, deadline: float) -> Verdict:
        """The verdict. Raises BadTests if the tests do not work, Unavailable if the sandbox does not, TimeoutError if
        the deadline (`time.monotonic()`) ends it before the code's own."""
        try:
            code.encode()
        except UnicodeEncodeError:
            return Verdict(0, len(_tests_of(tests)), False, "the code is no valid text")
        if isinstance(tests, AssertTests):
            return self._asserts(code, tests, deadline)
        if isinstance(tests, CallTests):
            return self._calls(code, tests, deadline)
        return self._programs(code, tests, deadline)

    def _asserts(self, code: str, tests: AssertTests, deadline: float) -> Verdict:
        job = {"tests": tests.tests, "setup": tests.setup, "entry_point": tests.entry_point}
        run = self._isolation.run_tests({"code": code, "setup": tests.setup}, job, deadline)
        total, passed, failures = len(tests.tests), 0, []
        for index, *parts in run.results:
            if index == "bad":
                raise BadTests(f"the tests cannot be run: {parts[0]}")
            if index == "load":
                return _verdict(0, total, run, [f"the code cannot be loaded: {parts[0]}"])
            if parts[0] == "unsupported":
                raise BadTests(f"a test that this reward cannot run: {parts[1]}: {tests.tests[index][:_SHOWN]}")
            passed += parts[0] == "passed"
            if parts[0] != "passed":
                failures.append(f"{tests.tests[index][-_SHOWN:].strip()}: {parts[1]}")
        if run.ended == "exit" and len(run.results) != total:  # only tests of the data set ran there
            raise Unavailable(f"the process of the tests died after {len(run.results)} of {total} tests")
        return _verdict(passed, total, run, failures)

    def _calls(self, code: str, tests: CallTests, deadline: float) -> Verdict:
        job = {"code": code, "setup": tests.setup, "fn_name": tests.fn_name, "calls": tests.inputs}
        run = self._isolation.run_calls(job, deadline)
        total, passed, failures = len(tests.outputs), 0, []
        for arguments, expected, result in zip(tests.inputs, tests.outputs, run.results, strict=False):
            if self._is_expected(result, expected):
                passed += 1
                continue
            call = f"{tests.fn_name}{_shown(arguments)}"
            failures.append(f"{call}: expected {_shown(expected)}, got {_shown(result)}")
        return _verdict(passed, total, run, failures)

    def _is_expected(self, result: Any, expected: Any) -> bool:
        """Whatever the result claims, it is compared here, as plain data."""
        if not isinstance(result, list) or len(result) != 2 or result[0] != "value":
            return False
        try:
            value = decode(result[1], _Opaque)
            # APPS and TACO put the one expected value into a list.
            wrapped = (
                isinstance(expected, list) and len(expected) == 1 and same_value(value, expected[0], self._tolerance)
            )
            return wrapped or same_value(value, expected, self._tolerance)
        except Exception:  # foreign code made it no message, or what cannot be compared: not the expected value
            return False

    def _programs(self, code: str, tests: InputOutputTests, deadline: float) -> Verdict:
        total, passed, timeout = len(tests.inputs), 0, False
        failures: list[str] = []
        for stdin, expected in zip(tests.inputs, tests.outputs, strict=True):
            run = self._isolation.run_program(code, stdin, deadline)
            timeout = timeout or run.ended == "timeout"
            printed = run.stdout.decode(errors="replace")
            if run.ended == "exit" and run.exit_code == 0 and same_output(printed, expected, self._tolerance):
                passed += 1
                continue
            wrong = _how(run) or f"expected {expected[:_SHOWN]!r}, got {printed[:_SHOWN]!r}"
            failures.append(f"input {stdin[:_SHOWN]!r}: {wrong}")
            if not self._every_test or timeout:  # the others would take as long
                break
        return Verdict(passed, total, timeout, failures[0] if failures else f"all {total} tests passed")


def _shown(value: Any) -> str:
    try:
        return str(value)[:_SHOWN]
    except (RecursionError, ValueError) as error:  # nested too deep, or a number of too many digits
        return f"a {type(value).__name__} that cannot be shown ({type(error).__name__})"


class _Opaque:
    """An object that is no plain data: equal to nothing."""

    def __init__(self, number: int) -> None:
        self.number = number


def _tests_of(tests: Tests) -> tuple[Any, ...]:
    return tests.tests if isinstance(tests, AssertTests) else tests.inputs


def _how(run: Run) -> str:
    """How a run went wrong, if it did."""
    if run.ended == "timeout":
        return "timeout: the code took too long"
    if run.ended == "output":
        return "output: the code printed too much"
    if run.exit_code:
        return f"exit code {run.exit_code}: {run.stderr.strip()[-_SHOWN:]}"
    return ""


def _verdict(passed: int, total: int, run: Run, failures: list[str]) -> Verdict:
    if passed == total:
        return Verdict(passed, total, False, f"all {total} tests passed")
    how = _how(run)
    found = " | ".join([*([how] if how else []), *failures[:1]])
    return Verdict(passed, total, run.ended == "timeout", found or "the code ended before its tests")
