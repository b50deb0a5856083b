"""Whether what a program printed or returned is what was expected. Runs outside the sandbox, on plain data."""

from __future__ import annotations

import math
from typing import Any


def same_output(printed: str, expected: str, tolerance: float) -> bool:
    """Equal line by line, white space between words and empty lines at the end aside.

    Words that are expected to be decimal fractions may differ by `tolerance`, relative or absolute.
    """
    left, right = _lines(printed), _lines(expected)
    return len(left) == len(right) and all(
        len(a) == len(b) and all(_same_word(x, y, tolerance) for x, y in zip(a, b, strict=True))
        for a, b in zip(left, right, strict=True)
    )


def _lines(text: str) -> list[list[str]]:
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
    """Equal as JSON: tuples are lists, keys of dictionaries are texts, fractions may differ by `tolerance`.

    True and 1 are different. Raises ValueError for a key that is a number of thousands of digits.
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
