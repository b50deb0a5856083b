"""Compares expressions by math-verify, with limits on the work that an answer can cause."""

from __future__ import annotations

import math
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from types import FrameType
from typing import Any

from rewards.verifiers.numerals import SIGNIFICANT_DIGITS, approximates, raised

MAX_DIGITS = 20_000
"""Most digits of the value of a power or factorial."""
MAX_NESTING = 24
MAX_EXPONENT = 100_000
"""Largest exponent, and most terms of a sum or product."""
CPU_SECONDS = 2.0
"""CPU time for one pair; not wall-clock time, so that a busy machine changes no verdict."""
RELATIVE_TOLERANCE = 1e-12
"""Tolerance between expressions with decimals, for the rounding of their floats."""

_SYMBOLS = {
    "×": "\\times ", "·": "\\cdot ", "÷": "/", "≤": "\\le ", "≥": "\\ge ", "≠": "\\ne ", "∞": "\\infty ", "π": "\\pi ",
    "±": "\\pm ", "∪": "\\cup ", "∩": "\\cap ", "∈": "\\in ", "½": "\\frac{1}{2}", "¼": "\\frac{1}{4}",
    "¾": "\\frac{3}{4}", "⅓": "\\frac{1}{3}", "⅔": "\\frac{2}{3}", "θ": "\\theta ", "−": "-", "∅": "\\emptyset ",
}  # fmt: skip
_TRANSLATION = str.maketrans(_SYMBOLS)
_ROOT = re.compile(r"√\s*(?:\(([^()]*)\)|(\d+|[A-Za-z]))")
_ROOT_IN_WORDS = re.compile(r"(?<![\\A-Za-z])sqrt\s*(?:\(([^()]*)\)|\{([^{}]*)\}|(\d+))")
_PI_IN_WORDS = re.compile(r"(?<![\\A-Za-z])pi(?![A-Za-z])")
_FUNCTION_IN_WORDS = re.compile(r"(?<![\\A-Za-z])(sin|cos|tan|log|ln)(?=\s*[({\d])")
_ARITHMETIC = re.compile(r"[\d\s.,+\-*/^()×÷%]+")
_BARE_PERCENT = re.compile(r"(?<!\\)%")  # starts a comment in LaTeX
_DOUBLE_STAR = re.compile(r"\*\*")

_WHOLE = r"\d{1,400}"
_POWER_OF_NUMBERS = re.compile(
    rf"(?<![\d.])({_WHOLE})(?:\.\d+)?\s*\^\s*"
    rf"(?:\{{\s*-?({_WHOLE})\s*\}}|\(\s*-?({_WHOLE})\s*\)|-?({_WHOLE})(?![\d.]|\s*\^))"
)
_FACTORIAL = re.compile(rf"(?:\(\s*({_WHOLE})\s*\)|\{{\s*({_WHOLE})\s*\}}|({_WHOLE}))\s*!+")
_BINOMIAL = re.compile(rf"\\[dt]?binom\s*\{{\s*({_WHOLE})\s*\}}\s*\{{\s*({_WHOLE})\s*\}}")
_GROUP = re.compile(rf"[({{]\s*({_WHOLE})\s*[)}}]")
_EXPONENT = re.compile(rf"\^\s*(?:\{{\s*)?-?({_WHOLE})")
_RANGE = re.compile(rf"\\(?:sum|prod)\b.{{0,80}}?\^\s*(?:\{{\s*)?({_WHOLE})")
_CLIPPED = 10**7


class _TooMuchWorkError(Exception): ...


class _OutOfTimeError(BaseException):
    """Not an Exception, because sympy catches those and continues."""


def verify_pairs(pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Return per (answer, gold) `right`, `wrong`, `wrong: WHY` (it cannot be evaluated) or `gold_unparsable`."""
    return [_verify(answer, gold) for answer, gold in pairs]


def over_limits(text: str) -> str:
    """Return why evaluating a text would take too much work; empty if it would not.

    Powers, factorials and binomials of whole numbers are estimated from the inside out, without computing them.
    """
    depth = deepest = 0
    for character in text:
        depth += (character in "({[") - (character in ")}]")
        deepest = max(deepest, depth)
    if deepest > MAX_NESTING:
        return f"nested deeper than {MAX_NESTING}"
    if "^" not in text and "!" not in text and "binom" not in text and "*" not in text:
        return ""
    text = _DOUBLE_STAR.sub("^", text.replace("\\left", "").replace("\\right", ""))
    for _ in range(MAX_NESTING):
        try:
            smaller = _POWER_OF_NUMBERS.sub(_estimated_power, text)
            smaller = _FACTORIAL.sub(_estimated_factorial, smaller)
            smaller = _BINOMIAL.sub(_estimated_binomial, smaller)
        except _TooMuchWorkError as error:
            return str(error)
        if smaller == text:
            smaller = _GROUP.sub(r" \1 ", text) if "^" in text or "!" in text else text
            if smaller == text:
                break
        text = smaller
    ranged = _RANGE.search(text)
    if ranged is not None and int(ranged[1]) > MAX_EXPONENT:
        return f"a sum or product of more than {MAX_EXPONENT} terms"
    if any(int(match[1]) > MAX_EXPONENT for match in _EXPONENT.finditer(text)):
        return f"an exponent above {MAX_EXPONENT}"
    return ""


def _estimated_power(match: re.Match[str]) -> str:
    base, exponent = int(match[1]), int(match[2] or match[3] or match[4])
    return _estimate(exponent * math.log10(base) if base > 1 else 0.0, lambda: base**exponent)


def _estimated_factorial(match: re.Match[str]) -> str:
    number = int(match[1] or match[2] or match[3])
    if match[0].endswith("!!"):
        number = max(number, 1) if number < 3 else _CLIPPED if number > 20 else math.factorial(number)
    digits = math.lgamma(min(number, 10**12) + 1) / math.log(10)
    return _estimate(digits, lambda: math.factorial(number))


def _estimated_binomial(match: re.Match[str]) -> str:
    top, bottom = int(match[1]), int(match[2])
    return _estimate(min(min(bottom, abs(top - bottom)) * math.log10(max(top, 1)), top * 0.302), lambda: _CLIPPED)


def _estimate(digits: float, value: Any) -> str:
    if digits > MAX_DIGITS:
        raise _TooMuchWorkError(f"a number of more than {MAX_DIGITS} digits")
    return f" {min(value(), _CLIPPED) if digits < 300 else _CLIPPED} "


def _verify(answer: str, gold: str) -> str:
    from math_verify import verify

    prepare()
    parsed_gold = _parse_gold(gold)
    if not parsed_gold:
        return "gold_unparsable"
    try:
        with _processor_time():
            # math-verify's own time-outs measure wall-clock time, by signals; _processor_time replaces them.
            right = verify(
                parsed_gold, _parse(answer), allow_set_relation_comp=True, timeout_seconds=None, raise_on_error=True
            )
    except _OutOfTimeError as error:
        return f"wrong: {error}"
    except Exception as error:  # the gold answer is fine, so the answer is at fault
        return f"wrong: {type(error).__name__}: {str(error)[:100]}"
    return "right" if right else "wrong"


@lru_cache(maxsize=4096)
def _parse_gold(gold: str) -> list[object]:
    """Parse the gold answer; empty if it does not even equal itself, whatever sympy does with it."""
    from math_verify import verify

    try:
        with _processor_time():
            parsed = _parse(gold)
            verify(parsed, parsed, timeout_seconds=None, raise_on_error=True)  # fails on a division by zero
    except (Exception, _OutOfTimeError):
        return []
    return parsed


@lru_cache(maxsize=4096)
def _parse(answer: str) -> list[object]:
    """Parse the answer; empty if it is not an expression."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    # Units have been compared already; math-verify would drop `ab` and `h`, which it takes for units.
    normal = replace(LatexExtractionConfig().normalization_config, units=False)
    latex_target = LatexExtractionConfig(boxed_match_priority=0, normalization_config=normal)
    targets = [latex_target, ExprExtractionConfig()]
    texts = [f"\\boxed{{{_as_latex(answer)}}}"]
    if _ARITHMETIC.fullmatch(answer):  # in other texts, it would search for a number
        texts.append(answer)
    for text in texts:
        parsed: list[object] = parse(text, extraction_config=targets, parsing_timeout=None, raise_on_error=True)
        if any(not isinstance(expression, str) for expression in parsed):
            return parsed
    return []


def _as_latex(text: str) -> str:
    text = _BARE_PERCENT.sub(r"\\%", raised(text))
    text = _ROOT.sub(lambda match: f"\\sqrt{{{match[1] or match[2]}}}", text).translate(_TRANSLATION)
    text = _ROOT_IN_WORDS.sub(lambda match: f"\\sqrt{{{match[1] or match[2] or match[3]}}}", text)
    return _FUNCTION_IN_WORDS.sub(r"\\\1", _PI_IN_WORDS.sub(r"\\pi ", text))


@contextmanager
def _processor_time() -> Iterator[None]:
    """Raise _OutOfTimeError in the block after CPU_SECONDS. Works only in a main thread, as in verifier processes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise _OutOfTimeError(f"takes more than {CPU_SECONDS:g} s of processor time")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS, 0.5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@lru_cache(maxsize=1)
def prepare() -> None:
    """Make math-verify compare with a relative tolerance: it rounds to 6 places (1e-9 equals 2e-9) and ignores tiny
    differences. Then let it build its LaTeX grammar, so that the seconds this takes are not charged to a pair."""
    from math_verify import grader, verify

    grader.sympy_numeric_eq = _numerically_equal
    verify(_parse("\\frac{1}{2}"), _parse("0.5"), timeout_seconds=None, raise_on_error=True)


def _numerically_equal(left: Any, right: Any, float_rounding: int, numeric_precision: int) -> bool:
    from sympy import Float, MatrixBase, MatrixExpr

    if isinstance(left, (MatrixBase, MatrixExpr)) and isinstance(right, (MatrixBase, MatrixExpr)):
        left, right = left.doit(), right.doit()
        return bool(
            isinstance(left, MatrixBase)
            and isinstance(right, MatrixBase)
            and left.shape == right.shape
            and all(
                _numerically_equal(one, other, float_rounding, numeric_precision)
                for one, other in zip(left.flat(), right.flat(), strict=True)
            )
        )
    left, right = _without_percent(left), _without_percent(right)
    if left == right:
        return True
    one, other = _evaluated(left), _evaluated(right)
    if one is None or other is None:
        return False
    scale = max(abs(one), abs(other))
    difference = abs(one - other)
    floats = left.has(Float), right.has(Float)
    if difference <= scale * RELATIVE_TOLERANCE:
        return any(floats) or difference <= scale * 1e-25
    if isinstance(left, Float) and not floats[1]:
        return _approximates(left, other)
    return isinstance(right, Float) and not floats[0] and _approximates(right, one)


def _without_percent(expression: Any) -> Any:
    from math_verify.grader import get_pct_val

    return get_pct_val(expression, expression)


def _evaluated(expression: Any) -> Any:
    """Evaluate to 40 digits; None if the result is not a number."""
    try:
        value = expression.doit().evalf(40)
    except (AttributeError, TypeError, ValueError):
        return None
    return value if getattr(value, "is_number", False) and value.is_finite else None


def _approximates(decimal: Any, exact: Any) -> bool:
    if not exact.is_real:
        return False
    return approximates(Decimal(str(decimal.n(15))), Fraction(str(exact.n(SIGNIFICANT_DIGITS + 20))))
