"""Right and wrong answers of many kinds, for rule-labelled pairs: what a policy writes, and what it might try."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

from rlkit.data.arithmetic import STYLES, Operator, Step, Style, WordProblem, write_solution
from rlkit.embedded.careless import careless_solution, careless_steps, recalculate, slip
from rlkit.embedded.judging import is_right

Writer = Callable[[WordProblem, Style, random.Random], str]


def _plain(problem: WordProblem, style: Style, rng: random.Random) -> str:
    return write_solution(problem.steps, problem.thing, style)


def _mixed_styles(problem: WordProblem, style: Style, rng: random.Random) -> str:
    lines = [write_solution((step,), problem.thing, rng.choice(STYLES)).splitlines()[0] for step in problem.steps]
    return "\n".join([*lines, f"#### {problem.answer}"])


def _one_line(problem: WordProblem, style: Style, rng: random.Random) -> str:
    changes = "".join(f"{step.operator}{step.right}" for step in problem.steps)
    return f"{problem.steps[0].left}{changes}={problem.answer}\n#### {problem.answer}"


def _answer_only(problem: WordProblem, style: Style, rng: random.Random) -> str:
    return f"#### {problem.answer}"


def _lucky(problem: WordProblem, style: Style, rng: random.Random) -> str:
    """Wrong steps, right answer: right by the rule."""
    steps = write_solution(careless_steps(problem.steps, 0.5, rng), problem.thing, style).splitlines()[:-1]
    return "\n".join([*steps, f"#### {problem.answer}"])


def _slips(problem: WordProblem, style: Style, rng: random.Random) -> str:
    return careless_solution(problem, style, 0.5, rng)


def _wrong_last_line(problem: WordProblem, style: Style, rng: random.Random) -> str:
    """Right steps, another number at the end."""
    lines = write_solution(problem.steps, problem.thing, style).splitlines()
    return "\n".join([*lines[:-1], f"#### {slip(problem.steps[-1], rng)}"])


def _misread(problem: WordProblem, style: Style, rng: random.Random) -> str:
    """One number or one operation taken wrongly from the question, the rest right."""
    wrong = rng.randrange(len(problem.steps))
    value, written = problem.steps[0].left, []
    for i, step in enumerate(problem.steps):
        if i == wrong:
            operators: tuple[Operator, ...] = ("+", "-", "*")
            other: Operator = rng.choice([operator for operator in operators if operator != step.operator])
            number = max(1, step.right + rng.choice((-2, -1, 1, 2)))
            changed = replace(step, right=number) if rng.random() < 0.5 else replace(step, operator=other)
            step = changed
        written.append(recalculate(value, step))
        value = written[-1].result
    return write_solution(tuple(written), problem.thing, style)


def _skipped_step(problem: WordProblem, style: Style, rng: random.Random) -> str:
    skipped = rng.randrange(len(problem.steps))
    value, written = problem.steps[0].left, []
    for step in (step for i, step in enumerate(problem.steps) if i != skipped):
        written.append(recalculate(value, step))
        value = written[-1].result
    if not written:
        written = [Step(value, "+", 0, value)]
    return write_solution(tuple(written), problem.thing, style)


def _no_marker(problem: WordProblem, style: Style, rng: random.Random) -> str:
    lines = write_solution(problem.steps, problem.thing, style).splitlines()
    return "\n".join([*lines[:-1], *rng.choice(([], [f"### {problem.answer}"], [f"{problem.answer}"], ["####"]))])


def _cut(problem: WordProblem, style: Style, rng: random.Random) -> str:
    text = write_solution(problem.steps, problem.thing, style)
    return text[: rng.randrange(len(text))]


def _second_thoughts(problem: WordProblem, style: Style, rng: random.Random) -> str:
    """The right answer, then another one: the last counts."""
    lines = write_solution(problem.steps, problem.thing, style).splitlines()
    return "\n".join([*lines, *(f"#### {slip(problem.steps[-1], rng)}" for _ in range(rng.randint(1, 3)))])


def _rambling(problem: WordProblem, style: Style, rng: random.Random) -> str:
    lines = write_solution(problem.steps, problem.thing, style).splitlines()
    looped = rng.choice(lines[:-1])
    return "\n".join([*lines[:-1], *[looped] * rng.randint(2, 6)])


def _nonsense(problem: WordProblem, style: Style, rng: random.Random) -> str:
    words = problem.question.split() + write_solution(problem.steps, problem.thing, style).split()
    return " ".join(rng.choice(words) for _ in range(rng.randint(0, 20)))


RIGHT: tuple[tuple[Writer, float], ...] = (
    (_plain, 0.70),
    (_mixed_styles, 0.08),
    (_one_line, 0.06),
    (_answer_only, 0.06),
    (_lucky, 0.10),
)
WRONG: tuple[tuple[Writer, float], ...] = (
    (_slips, 0.42),
    (_misread, 0.15),
    (_wrong_last_line, 0.14),
    (_skipped_step, 0.08),
    (_no_marker, 0.06),
    (_cut, 0.05),
    (_second_thoughts, 0.03),
    (_rambling, 0.03),
    (_nonsense, 0.04),
)
"""Kinds of answers and how often each is drawn."""


def right_answer(problem: WordProblem, style: Style, rng: random.Random) -> str:
    """A text that the rule judges right."""
    return _draw(RIGHT, problem, style, rng, right=True)


def wrong_answer(problem: WordProblem, style: Style, rng: random.Random) -> str:
    """A text that the rule judges wrong; most are near misses."""
    return _draw(WRONG, problem, style, rng, right=False)


def _draw(
    kinds: tuple[tuple[Writer, float], ...], problem: WordProblem, style: Style, rng: random.Random, right: bool
) -> str:
    writers, weights = zip(*kinds, strict=True)
    while True:
        text: str = rng.choices(writers, weights)[0](problem, style, rng)
        if is_right(text, problem.answer) == right:
            return text
