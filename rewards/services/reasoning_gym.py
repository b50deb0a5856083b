"""Scores by reasoning-gym's own `score_answer`."""

from __future__ import annotations

import ast
import json
import math
from functools import lru_cache
from typing import Any

COLUMN = "reasoning_gym"
"""What `data=reasoning_gym` gives: data set, options and entry, as a Python literal."""

RUNS_ANSWERS = frozenset(
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
"""Data sets whose `score_answer` evaluates the answer, with `eval` or sympy's parser, which does so too."""


def dataset_of(column: str) -> str:
    name: str = ast.literal_eval(column)["name"]
    return name


def score_answer(column: str, answer: str | None) -> float:
    """From 0 to 1; 1 is right. An answer at which the package raises is worth 0; None is no answer."""
    task = ast.literal_eval(column)
    dataset = _dataset(task["name"], json.dumps(task["options"]))
    try:
        score = float(dataset.score_answer(answer, task["entry"]))
    except Exception:
        return 0.0
    return min(max(score, 0.0), 1.0) if math.isfinite(score) else 0.0


def tagged_answer(text: str) -> str | None:
    """What the last pair of <answer> and </answer> encloses."""
    before, end, _ = text.rpartition("</answer>")
    _, start, inside = before.rpartition("<answer>")
    return inside.strip() if end and start else None


@lru_cache(maxsize=64)
def _dataset(name: str, options: str) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(name, seed=0, size=1, **json.loads(options))
