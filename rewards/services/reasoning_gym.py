"""Scores answers by reasoning-gym's own `score_answer`."""

from __future__ import annotations

import ast
import json
import math
import re
from functools import lru_cache
from typing import Any

COLUMN = "reasoning_gym"
"""Column written by `data=reasoning_gym`: data set, options and entry, as a Python literal. (rlkit/data repeats the
name, because neither may import the other.)"""

_EVALUATE = frozenset(
    {
        "binary_matrix",
        "countdown",
        "intermediate_integration",
        "n_queens",
        "polynomial_multiplication",
        "puzzle24",
        "simple_integration",
        "spiral_matrix",
        "string_insertion",
    }
)
"""Data sets whose `score_answer` evaluates the answer as code, with `eval` or with sympy's parser, which uses it."""
_FUNCTIONS = re.compile(r"a?(sin|cos|tan)h?|sec|csc|cot|exp|log|ln|sqrt|pi")
_NAME = re.compile(r"[^\W\d]\w*")


def score_answer(column: str, answer: str | None) -> float:
    """Score from 0 to 1; 1 is right. An answer for which the package raises scores 0; None means no answer.

    If the package would evaluate the answer, one with names other than those of mathematics also scores 0: the policy's
    text may only be executed in sandboxes.
    """
    task = ast.literal_eval(column)
    if task["name"] in _EVALUATE and answer is not None and not names_mathematics_alone(answer):
        return 0.0
    dataset = _dataset(task["name"], json.dumps(task["options"]))
    try:
        score = float(dataset.score_answer(answer, task["entry"]))
    except Exception:
        return 0.0
    return min(max(score, 0.0), 1.0) if math.isfinite(score) else 0.0


def names_mathematics_alone(answer: str) -> bool:
    """Whether it has only harmless names: single letters, functions, and strings of A to E as in `string_insertion`.

    >>> names_mathematics_alone("x**2*sin(3*x) + C"), names_mathematics_alone("__import__('os')")
    (True, False)
    """
    # Python normalises some non-ASCII letters to ASCII ones.
    return answer.isascii() and all(
        len(name) == 1 or _FUNCTIONS.fullmatch(name) or set(name) <= set("ABCDE") for name in _NAME.findall(answer)
    )


@lru_cache(maxsize=64)
def _dataset(name: str, options: str) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(name, seed=0, size=1, **json.loads(options))
