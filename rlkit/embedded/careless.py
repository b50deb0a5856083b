"""Worked solutions with mistakes: what the warm start mixes in, and what POLAR's rejected answers look like."""

from __future__ import annotations

import random
from dataclasses import replace

from rlkit.data.arithmetic import Operator, Step, Style, WordProblem, write_solution


def slip(step: Step, rng: random.Random) -> int:
    """A wrong result for one calculation: mostly a near miss, sometimes another operation or digits swapped."""
    right, left, other = step.result, step.left, step.right
    near = [right + 1, right - 1, right + 2, right - 2, right + 10, right - 10]
    confused = [left + other, abs(left - other), left * other, int(str(right)[::-1]), left, other]
    candidates = near if rng.random() < 0.7 else confused
    wrong = [number for number in candidates if number >= 0 and number != right]
    return rng.choice(wrong)


def careless_steps(steps: tuple[Step, ...], slip_rate: float, rng: random.Random) -> tuple[Step, ...]:
    """The calculation by someone who gets each step wrong with probability `slip_rate` and goes on from there."""
    written: list[Step] = []
    value = steps[0].left
    for step in steps:
        carried = recalculate(value, step)
        result = slip(carried, rng) if rng.random() < slip_rate else carried.result
        written.append(replace(carried, result=result))
        value = result
    return tuple(written)


def recalculate(value: int, step: Step) -> Step:
    """The step taken from another value; a subtraction that would go below zero stops at zero."""
    results: dict[Operator, int] = {
        "+": value + step.right,
        "-": max(0, value - step.right),
        "*": value * step.right,
    }
    return replace(step, left=value, result=results[step.operator])


def careless_solution(problem: WordProblem, style: Style, slip_rate: float, rng: random.Random) -> str:
    """A solution in the given phrasing; right with probability of about (1 - slip_rate) ** steps."""
    return write_solution(careless_steps(problem.steps, slip_rate, rng), problem.thing, style)
