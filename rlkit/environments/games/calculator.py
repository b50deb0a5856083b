"""Arithmetic that is too hard for a small model's head, and a tool that does it.

environment  What is 17*23-45?
policy       calc(expression="17*23-45")
tool         346
policy       346
"""

from __future__ import annotations

import ast
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from pydantic import Field

from rlkit.environments.base import Action, Environment, Step, Task
from rlkit.environments.games.drawing import DrawnConfig, drawn
from rlkit.environments.tool import tool
from rlkit.environments.tools import calculator
from rlkit.experience import Message

_WHOLE_NUMBERS = (
    ast.Expression, ast.Constant, ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.UnaryOp, ast.USub
)  # fmt: skip


class CalculatorConfig(DrawnConfig):
    max_turns: int = Field(default=3, ge=1)
    """Calls, plus the answer."""


class Calculator(Environment):
    """The right answer earns 1; any answer ends the episode.

    >>> task = Calculator.tasks(Calculator.Config(), "heldout", seed=0)[0]
    >>> task.messages[0].content, task.answer
    ('What is 41*59+59?', '2478')
    """

    Config = CalculatorConfig
    config: CalculatorConfig

    @classmethod
    def tasks(cls, config: CalculatorConfig, split: Literal["train", "heldout"], seed: int) -> Sequence[Task]:
        return [calculation(one) for one in drawn(drawn_expression, str, split, seed, config.tasks_of(split))]

    def reset(self, task: Task, seed: int) -> None:
        self.answer = task.answer

    @tool
    def calc(self, expression: str) -> str:
        """Work out whole numbers with +, -, * and brackets.

        expression: what to work out
        """
        return str(value(expression))

    async def run_tools(self, action: Action) -> Step:
        return replace(await super().run_tools(action), success=False)  # in case no turn is left to answer

    def final(self, action: Action) -> Step:
        right = action.text.strip() == self.answer
        return Step(reward=float(right), done=True, success=right)


def value(expression: str) -> int:
    """Evaluate an expression of whole numbers. Raises ValueError if it is not one."""
    if len(expression) > 64:
        raise ValueError("longer than 64 characters")
    try:
        nodes = list(ast.walk(ast.parse(expression.strip(), mode="eval")))
    except SyntaxError as error:
        raise ValueError(f"{expression!r} is no expression") from error
    constants = [node.value for node in nodes if isinstance(node, ast.Constant)]
    if not all(isinstance(node, _WHOLE_NUMBERS) for node in nodes) or any(type(c) is not int for c in constants):
        raise ValueError("only whole numbers with +, -, * and brackets are worked out")
    return int(calculator.value(expression))


def drawn_expression(rng: random.Random) -> str:
    left, right, third = (rng.randint(11, 99) for _ in range(3))
    return f"{left}*{right}{rng.choice('+-')}{third}"


def calculation(expression: str) -> Task:
    question = Message("user", f"What is {expression}?")
    columns = {"expression": expression}
    return Task(f"calculator/{expression}", (question,), answer=str(value(expression)), columns=columns)
