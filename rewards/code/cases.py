"""The tests of a data row, in the three shapes that data sets use."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


class BadTests(ValueError):
    """A row whose tests cannot be used; the message is the reason."""


@dataclass(frozen=True)
class AssertTests:
    """Python texts that must run without an exception (HumanEval, MBPP)."""

    tests: tuple[str, ...]
    setup: str = ""
    """Runs before the tests and before the solution: imports, functions that both use."""
    entry_point: str | None = None
    """The function under test, where the setup holds a stub of it."""


@dataclass(frozen=True)
class InputOutputTests:
    """Standard input and expected standard output of each test (APPS, TACO)."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class CallTests:
    """Arguments and expected value of each call of one function (APPS, TACO with `fn_name`)."""

    fn_name: str
    inputs: tuple[list[Any], ...]
    outputs: tuple[Any, ...]
    setup: str = ""


Tests = AssertTests | InputOutputTests | CallTests


def read_tests(value: Any, setup: Any = None, entry_point: Any = None, prompt: str = "") -> Tests:
    """Tests from the cells of a row.

    `value`: a list of assert statements, a Python text (`check(<entry point>)` is added to it where there is an entry
    point), or `{"inputs": [...], "outputs": [...], "fn_name": ...}`, also as a JSON text. `setup`: Python text or list
    of lines. `prompt`: a question that is Python itself, part of the setup. Raises BadTests.
    """
    first = _setup(setup)
    if prompt:
        first = f"{first}\n{prompt}" if first else prompt
    if entry_point is not None and not (isinstance(entry_point, str) and entry_point.isidentifier()):
        raise BadTests(f"the entry point is no name: {entry_point!r}")
    value = _from_json(value)
    if isinstance(value, Mapping):
        return _input_output(value, first)
    if isinstance(value, str) and value.strip():
        called = f"{value}\n\ncheck({entry_point})\n" if entry_point else value
        return AssertTests((called,), first, entry_point)
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
    raise BadTests(f"the setup is neither a text nor a list of lines: {str(value)[:80]!r}")


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
    return InputOutputTests(tuple(map(_lines, inputs)), tuple(map(_lines, outputs)))


def _lines(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        return "\n".join(value)
    raise BadTests(f"inputs and outputs must be texts or lists of lines, not {str(value)[:80]!r}")
