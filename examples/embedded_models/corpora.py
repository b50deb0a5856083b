"""Corpora of the embedded models: exercises, worked solutions, and careless ones."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from rlkit.data.arithmetic import STYLES, ArithmeticConfig, Operator, Step, Style, WordProblem, write_solution

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from examples.embedded_models.supervised import Example


def slip(step: Step, rng: random.Random) -> int:
    """Return a wrong result: mostly a near miss, sometimes that of another operation, or with digits reversed."""
    right, left, other = step.result, step.left, step.right
    near = [right + 1, right - 1, right + 2, right - 2, right + 10, right - 10]
    confused = [left + other, abs(left - other), left * other, int(str(right)[::-1]), left, other]
    candidates = near if rng.random() < 0.7 else confused
    wrong = [number for number in candidates if number >= 0 and number != right]
    return rng.choice(wrong)


def careless_steps(steps: tuple[Step, ...], slip_rate: float, rng: random.Random) -> tuple[Step, ...]:
    """Make each step wrong with probability `slip_rate`; later steps continue from the mistake."""
    written: list[Step] = []
    value = steps[0].left
    for step in steps:
        carried = recalculate(value, step)
        result = slip(carried, rng) if rng.random() < slip_rate else carried.result
        written.append(replace(carried, result=result))
        value = result
    return tuple(written)


def recalculate(value: int, step: Step) -> Step:
    """Recalculate a step from another value; subtraction stops at zero."""
    results: dict[Operator, int] = {
        "+": value + step.right,
        "-": max(0, value - step.right),
        "*": value * step.right,
    }
    return replace(step, left=value, result=results[step.operator])


def careless_solution(problem: WordProblem, style: Style, slip_rate: float, rng: random.Random) -> str:
    """Write a solution that is right with probability of about (1 - slip_rate) ** steps."""
    return write_solution(careless_steps(problem.steps, slip_rate, rng), problem.thing, style)


Batches = Iterator[list["Example"]]
EXERCISE_SHARE = 0.3
"""Share of exercises in the base model's corpus; the rest are training problems with right solutions."""


def tokenizer_texts(problems: Sequence[WordProblem]) -> Iterator[str]:
    for problem in problems:
        yield problem.question
        for style in STYLES:
            yield write_solution(problem.steps, problem.thing, style)


def exercises(config: ArithmeticConfig, rng: random.Random) -> str:
    """Write three to six calculations without a story, in the task's range."""
    steps: list[Step] = []
    value = rng.randint(0, config.max_value)
    count = rng.randint(3, 6)
    while len(steps) < count:
        operators: tuple[Operator, ...] = ("+", "+", "-", "-", "*")
        operator = rng.choice(operators)
        largest = config.max_factor if operator == "*" else config.max_operand
        step = recalculate(value, Step(value, operator, rng.randint(2, largest), 0))
        if step.result > config.max_value or (operator == "-" and step.right > value):
            value = rng.randint(0, config.max_value)
            continue
        steps.append(step)
        value = step.result if rng.random() < 0.5 else rng.randint(0, config.max_value)
    return write_solution(tuple(steps), "apples", rng.choice(STYLES[:3]))


class ProblemTokens:
    """Problems whose prompts are rendered only once."""

    def __init__(self, problems: Sequence[WordProblem], tokenizer: PreTrainedTokenizerBase) -> None:
        self.problems = problems
        self.tokenizer = tokenizer
        chats = [[{"role": "user", "content": problem.question}] for problem in problems]
        encoded = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=True, return_dict=True)
        self.prompts = [tuple(ids) for ids in encoded["input_ids"]]

    def answered(self, index: int, solution: str) -> Example:
        from examples.embedded_models.supervised import Example

        target = self.tokenizer.encode(solution, add_special_tokens=False)
        return Example(self.prompts[index], (*target, self.tokenizer.eos_token_id))


def base_batches(tokens: ProblemTokens, config: ArithmeticConfig, size: int, seed: int) -> Batches:
    """Yield exercises and right solutions endlessly."""
    from examples.embedded_models.supervised import Example

    rng = random.Random(f"base/{seed}")
    tokenizer = tokens.tokenizer

    def draw() -> Example:
        if rng.random() < EXERCISE_SHARE:
            ids = tokenizer.encode(exercises(config, rng), add_special_tokens=False)
            return Example((ids[0],), tuple(ids[1:]))
        index = rng.randrange(len(tokens.problems))
        problem = tokens.problems[index]
        return tokens.answered(index, write_solution(problem.steps, problem.thing, rng.choice(STYLES)))

    return _batches(draw, size)


def careless_batches(
    tokens: ProblemTokens, slip_rate: float, size: int, seed: int, styles: Sequence[Style] = STYLES
) -> Batches:
    """Yield solutions with slips endlessly: a policy that imitates them has headroom."""
    rng = random.Random(f"careless/{seed}")

    def draw() -> Example:
        index = rng.randrange(len(tokens.problems))
        return tokens.answered(index, careless_solution(tokens.problems[index], rng.choice(styles), slip_rate, rng))

    return _batches(draw, size)


def _batches(draw: Callable[[], Example], size: int) -> Batches:
    while True:
        yield [draw() for _ in range(size)]
