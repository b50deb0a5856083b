"""The tool `calculator`: arithmetic on Python's numbers, without `eval`."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from typing import ClassVar, Literal

from rlkit.environments.tool import tool
from rlkit.environments.tools.base import Session, ToolOptions

LONGEST_EXPRESSION = 1000
LARGEST_BITS = 10_000
"""Size limit of whole numbers; floats end at 1.8e308."""
Number = int | float

_OPERATORS: dict[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_MATHEMATICS = (
    "sqrt exp log log2 log10 sin cos tan asin acos atan floor ceil degrees radians gcd lcm comb factorial hypot"
)


def _rounded(number: Number, digits: int | None = None) -> Number:
    if digits is not None and abs(digits) > LARGEST_BITS:  # Python would compute 10 to that power
        raise ValueError("an argument of round is too large")
    return round(number, digits)


_FUNCTIONS: dict[str, Callable[..., Number]] = {
    **{name: getattr(math, name) for name in _MATHEMATICS.split()},
    "abs": abs,
    "min": min,
    "max": max,
    "round": _rounded,
}
_CONSTANTS = {"pi": math.pi, "e": math.e}
_LARGEST_ARGUMENT = {"factorial": 1000, "comb": 1000, "lcm": 10**100}


class CalculatorSession(Session):
    @tool
    def calculator(self, expression: str) -> str:
        """Work out an arithmetic expression with + - * / // % ** (or ^), brackets, pi, e, and functions like sqrt.

        expression: what to work out, like (17*23-45)/sqrt(2)
        """
        try:
            return shown(value(expression))
        except (ValueError, ArithmeticError, TypeError) as error:
            return f"error: {error.args[-1]}"  # the first argument of an OverflowError may be a number


class Calculator(ToolOptions):
    kind: Literal["calculator"] = "calculator"
    session: ClassVar[type[Session]] = CalculatorSession


def value(expression: str) -> Number:
    """Evaluate an expression. Raises ValueError, ArithmeticError or TypeError with what is wrong.

    >>> value("2^10 - 1"), value("sqrt(2) * sqrt(2)")
    (1023, 2.0000000000000004)
    """
    if len(expression) > LONGEST_EXPRESSION:
        raise ValueError(f"the expression is longer than {LONGEST_EXPRESSION} characters")
    try:
        body = ast.parse(expression.strip().replace("^", "**"), mode="eval").body
        return _value(body)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"{expression!r:.100} cannot be read as an expression") from error


def _value(node: ast.expr) -> Number:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        return _bounded(node.value)
    if isinstance(node, ast.Name) and node.id in _CONSTANTS:
        return _CONSTANTS[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        number = _value(node.operand)
        return -number if isinstance(node.op, ast.USub) else number
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow):
            return _bounded(_power(left, right))
        if type(node.op) in _OPERATORS:
            return _bounded(_OPERATORS[type(node.op)](left, right))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        return _called(node.func.id, [_value(argument) for argument in node.args])
    raise ValueError(f"{ast.unparse(node)!r:.100} is no arithmetic")


def _called(name: str, arguments: list[Number]) -> Number:
    if name not in _FUNCTIONS:
        raise ValueError(f"there is no function {name!r:.100}; there are {', '.join(sorted(_FUNCTIONS))}")
    if any(abs(number) > _LARGEST_ARGUMENT.get(name, math.inf) for number in arguments):
        raise ValueError(f"an argument of {name} is too large")
    return _bounded(_FUNCTIONS[name](*arguments))


def _power(base: Number, exponent: Number) -> Number:
    whole = isinstance(base, int) and isinstance(exponent, int)
    if whole and (int(base).bit_length() - 1) * abs(exponent) > LARGEST_BITS:  # at most twice that, then refused below
        raise ValueError("the power is too large")
    power = base**exponent
    if isinstance(power, complex):
        raise ValueError("the power of a negative number to a fraction is not real")
    number: Number = power
    return number


def _bounded(number: Number) -> Number:
    if isinstance(number, int) and number.bit_length() > LARGEST_BITS:
        raise ValueError("a number is too large")
    if isinstance(number, float) and not math.isfinite(number):
        raise ValueError("the result is not finite")
    return number


def shown(number: Number) -> str:
    """Format whole numbers with all digits and others with twelve, so that rounding errors and machine-dependent last
    bits do not show.

    >>> shown(0.1 + 0.2), shown(6 / 2), shown(10**20)
    ('0.3', '3', '100000000000000000000')
    """
    return str(number) if isinstance(number, int) else f"{number:.12g}"
