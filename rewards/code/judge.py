"""Turns a response and its data row into a verdict."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rewards.services.sandbox import Isolation, Run, Unavailable, decode
from rlkit.experience.texts import encodable


class BadTests(ValueError): ...


@dataclass(frozen=True)
class AssertTests:
    """Python code that must run without an exception (HumanEval, MBPP)."""

    tests: tuple[str, ...]
    setup: str = ""
    entry_point: str | None = None
    """Name of the function under test, if the setup holds a stub of it."""


@dataclass(frozen=True)
class InputOutputTests:
    """Each test's standard input and expected standard output (APPS, TACO)."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class CallTests:
    """Arguments and expected value of each call to one function (APPS, TACO with `fn_name`)."""

    fn_name: str
    inputs: tuple[list[Any], ...]
    outputs: tuple[Any, ...]
    setup: str = ""


Tests = AssertTests | InputOutputTests | CallTests


def read_tests(value: Any, setup: Any = None, entry_point: Any = None, prompt: str = "") -> Tests:
    """Read tests from the cells of a row; raise BadTests.

    `value`: assert statements, a Python text (with `check(<entry point>)` added if there is one), or `{"inputs": [...],
    "outputs": [...], "fn_name": ...}`, also as JSON. `setup`: Python text or lines. `prompt`: Python that belongs to
    the setup.
    """
    first = _setup(setup)
    if prompt:
        first = f"{first}\n{prompt}" if first else prompt
    if entry_point is not None and not (isinstance(entry_point, str) and entry_point.isidentifier()):
        raise BadTests(f"the entry point is not a name: {entry_point!r}")
    value = _from_json(value)
    if isinstance(value, Mapping):
        return _input_output(value, first)
    if isinstance(value, str) and value.strip():
        test = f"{value}\n\ncheck({entry_point})\n" if entry_point else value
        return AssertTests((test,), first, entry_point)
    if (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and value
        and all(isinstance(test, str) for test in value)
    ):
        return AssertTests(tuple(value), first, entry_point)
    raise BadTests(f"no tests: {str(value)[:80]!r}")


def _setup(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence) and all(isinstance(line, str) for line in value):
        return "\n".join(value)
    raise BadTests(f"the setup is neither text nor a list of lines: {str(value)[:80]!r}")


def _from_json(value: Any) -> Any:
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _input_output(value: Mapping[str, Any], setup: str) -> Tests:
    inputs, outputs, fn_name = value.get("inputs"), value.get("outputs"), value.get("fn_name")
    if not isinstance(inputs, list) or not isinstance(outputs, list) or not inputs or len(inputs) != len(outputs):
        raise BadTests("inputs and outputs must be lists of the same length, and not empty")
    if fn_name:
        if not isinstance(fn_name, str) or not all(isinstance(arguments, list) for arguments in inputs):
            raise BadTests("with fn_name, each input must be a list of arguments")
        return CallTests(fn_name, tuple(inputs), tuple(outputs), setup)
    return InputOutputTests(tuple(map(_whole_lines, inputs)), tuple(map(_whole_lines, outputs)))


def _whole_lines(value: Any) -> str:
    lines = value if isinstance(value, list) else [value]
    if not all(isinstance(line, str) for line in lines):
        raise BadTests(f"inputs and outputs must be texts or lists of lines, not {str(value)[:80]!r}")
    text = "\n".join(lines)
    if text != encodable(text):
        raise BadTests(f"an input or output is not valid Unicode, so no program can read or print it: {text[:80]!r}")
    return text


_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})[ \t]*([^\s`]*)[^\n`]*$", re.MULTILINE)
_PYTHON = {"python", "py", "python3"}


def last_python_block(text: str) -> str | None:
    r"""Return the last code block fenced as Python, else the last one without a language, else None.

    An unclosed block extends to the end of the text.

    >>> last_python_block("First\n```python\nx = 1\n```\nbetter\n```python\nx = 2\n```")
    'x = 2\n'
    """
    last: dict[bool, str] = {}  # whether the block says that it is Python -> the last such block
    position = 0
    while opening := _FENCE.search(text, position):
        mark, language = opening[1], opening[2].lower()
        closing = re.compile(rf"^ {{0,3}}{mark[0]}{{{len(mark)},}}[ \t]*$", re.MULTILINE).search(text, opening.end())
        content = text[opening.end() + 1 : closing.start() if closing else len(text)]
        if language in _PYTHON or not language:
            last[language in _PYTHON] = content
        if closing is None:
            break
        position = closing.end()
    return last.get(True, last.get(False))


def same_output(printed: str, expected: str, tolerance: float) -> bool:
    """Compare line by line, ignoring the amount of white space between words and empty lines at the end.

    Expected decimal fractions may differ by `tolerance`, relative or absolute.
    """
    left, right = _split_lines(printed), _split_lines(expected)
    return len(left) == len(right) and all(
        len(a) == len(b) and all(_same_word(x, y, tolerance) for x, y in zip(a, b, strict=True))
        for a, b in zip(left, right, strict=True)
    )


def _split_lines(text: str) -> list[list[str]]:
    return [line.split() for line in text.rstrip().split("\n")]


def _same_word(printed: str, expected: str, tolerance: float) -> bool:
    if printed == expected:
        return True
    if tolerance == 0 or not any(mark in expected for mark in ".eE"):
        return False
    try:
        return math.isclose(float(printed), float(expected), rel_tol=tolerance, abs_tol=tolerance)
    except ValueError:
        return False


def same_value(returned: Any, expected: Any, tolerance: float) -> bool:
    """Compare as JSON: tuples are lists, dictionary keys are texts, fractions may differ by `tolerance`.

    True is not 1. Raise ValueError for a key that is a number of thousands of digits.
    """
    if isinstance(expected, bool) or isinstance(returned, bool):
        return returned is expected
    if isinstance(expected, int | float) and isinstance(returned, int | float):
        return returned == expected or (isinstance(expected, float) and _close(returned, expected, tolerance))
    if isinstance(expected, list | tuple):
        return (
            isinstance(returned, list | tuple)
            and len(returned) == len(expected)
            and all(same_value(a, b, tolerance) for a, b in zip(returned, expected, strict=True))
        )
    if isinstance(expected, dict):
        if not isinstance(returned, dict):
            return False
        left = {str(key): value for key, value in returned.items()}
        right = {str(key): value for key, value in expected.items()}
        return left.keys() == right.keys() and all(same_value(left[key], right[key], tolerance) for key in right)
    return type(returned) is type(expected) and bool(returned == expected)


def _close(returned: float, expected: float, tolerance: float) -> bool:
    try:
        return math.isclose(returned, expected, rel_tol=tolerance, abs_tol=tolerance)
    except OverflowError:  # a whole number beyond all floats
        return False


_SHOWN = 300


@dataclass(frozen=True)
class Verdict:
    passed: int
    total: int
    timeout: bool
    """The wall-clock deadline passed, or CPU time ran out."""
    trace: str


class Judge:
    def __init__(self, isolation: Isolation, every_test: bool, float_tolerance: float) -> None:
        self._isolation, self._every_test, self._tolerance = isolation, every_test, float_tolerance

    def judge(self, code: str, tests: Tests, deadline: float) -> Verdict:
        """Run code against tests. Raise BadTests or Unavailable if the tests or the sandbox do not work, TimeoutError
        if `deadline` (`time.monotonic()`) comes before the code's own deadline."""
        if code != encodable(code):
            return Verdict(0, len(_tests_of(tests)), False, "the code is not valid Unicode")
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
        if run.ended == "exit" and len(run.results) != total:  # only the data set's tests ran in that process
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
        # The result comes from untrusted code: compare it here, as plain data.
        if not isinstance(result, list) or len(result) != 2 or result[0] != "value":
            return False
        try:
            value = decode(result[1], _Opaque)
            # APPS and TACO wrap the single expected value in a list.
            wrapped = (
                isinstance(expected, list) and len(expected) == 1 and same_value(value, expected[0], self._tolerance)
            )
            return wrapped or same_value(value, expected, self._tolerance)
        except Exception:  # untrusted code sent no valid message or nothing comparable
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
            if not self._every_test or timeout:  # the other tests would take as long
                break
        return Verdict(passed, total, timeout, failures[0] if failures else f"all {total} tests passed")


def _shown(value: Any) -> str:
    try:
        return str(value)[:_SHOWN]
    except (RecursionError, ValueError) as error:  # nested too deep, or a number of too many digits
        return f"a {type(value).__name__} that cannot be shown ({type(error).__name__})"


class _Opaque:
    def __init__(self, number: int) -> None:
        self.number = number


def _tests_of(tests: Tests) -> tuple[Any, ...]:
    return tests.tests if isinstance(tests, AssertTests) else tests.inputs


def _how(run: Run) -> str:
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
    trace = " | ".join([*([how] if how else []), *failures[:1]])
    return Verdict(passed, total, run.ended == "timeout", trace or "the code ended before its tests")
