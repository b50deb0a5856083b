"""The embedded task: seeded word problems in GSM8K's form, for a model of half a million parameters.

question   Tom has 12 apples. He buys 5 more. He loses 3. How many apples does Tom have now?
solution   12+5=17
           17-3=14
           #### 14
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from pydantic import Field, model_validator

from rlkit.data.base import BadRow, DataConfig, DataError, DataSource, Problem, Split
from rlkit.experience import Message

Operator = Literal["+", "-", "*"]
Style = Literal["equations", "words", "annotated", "running"]
STYLES: tuple[Style, ...] = ("equations", "words", "annotated", "running")
"""Phrasings of a worked solution; a problem's references are in this order."""

_SPOKEN: dict[Operator, str] = {"+": "plus", "-": "minus", "*": "times"}
_HELDOUT_BUCKETS = 8
_FRUITLESS_DRAWS = 20_000
PREVIEWED = 64


@dataclass(frozen=True, slots=True)
class Step:
    """`left operator right = result` (in a careless solution the result may be wrong)."""

    left: int
    operator: Operator
    right: int
    result: int


@dataclass(frozen=True, slots=True)
class WordProblem:
    situation: str
    question: str
    thing: str
    steps: tuple[Step, ...]

    @property
    def answer(self) -> int:
        return self.steps[-1].result

    @property
    def skeleton(self) -> str:
        """Situation and numbers without names and things (`bus:12+5-3`), which decide the split."""
        changes = "".join(f"{step.operator}{step.right}" for step in self.steps)
        return f"{self.situation}:{self.steps[0].left}{changes}"


def write_solution(steps: tuple[Step, ...], thing: str, style: Style) -> str:
    """Return the solution; its last line is `#### answer`."""
    if style == "equations":
        lines = [f"{step.left}{step.operator}{step.right}={step.result}" for step in steps]
    elif style == "words":
        lines = [f"{step.left} {_SPOKEN[step.operator]} {step.right} is {step.result}." for step in steps]
    elif style == "annotated":
        lines = [f"<<{step.left}{step.operator}{step.right}={step.result}>>{step.result} {thing}" for step in steps]
    else:
        lines = [", then ".join(str(number) for number in (steps[0].left, *(step.result for step in steps))) + "."]
    return "\n".join([*lines, f"#### {steps[-1].result}"])


class ArithmeticConfig(DataConfig):
    """Sizes and ranges of the embedded task. The embedded models were trained with the defaults."""

    train_problems: int = Field(default=16384, ge=1, le=10_000_000)
    """Number of training problems."""
    heldout_problems: int = Field(default=1024, ge=1, le=1_000_000)
    """Number of problems used only for evaluation; no training problem has the same situation and numbers."""
    min_steps: int = Field(default=1, ge=1, le=3)
    """Fewest calculations in a problem."""
    max_steps: int = Field(default=3, ge=1, le=3)
    """Most calculations in a problem."""
    max_operand: int = Field(default=12, ge=4)
    """Largest number added or subtracted; also the largest amount at the start."""
    max_factor: int = Field(default=4, ge=2)
    """Largest multiplier."""
    max_value: int = Field(default=40, ge=8)
    """Largest result (the smallest is 0)."""
    problem_seed: int = Field(default=2026, ge=0)
    """Seed for drawing the problems. Separate from the run's `seed`, so that all runs share problems and split."""

    @model_validator(mode="after")
    def _ordered(self) -> ArithmeticConfig:
        if self.min_steps > self.max_steps:
            raise ValueError(f"min_steps={self.min_steps} is larger than max_steps={self.max_steps}")
        return self


class Arithmetic(DataSource):
    """Word problems about adding, subtracting and multiplying small whole numbers.

    >>> source = Arithmetic(Arithmetic.Config(), seed=0)
    >>> problems, bad_rows = source.load("heldout")
    >>> problems[0].answer, len(problems[0].references), bad_rows
    ('25', 4, [])
    """

    Config = ArithmeticConfig

    def load(self, split: Split) -> tuple[list[Problem], list[BadRow]]:
        return [_as_problem(problem) for problem in draw_problems(self.config, split)], []

    def preview(self, split: Split) -> list[Problem]:
        few = {f"{split}_problems": min(PREVIEWED, getattr(self.config, f"{split}_problems"))}
        return list(_previewed(self.config.model_copy(update=few), split))

    def provides(self) -> frozenset[str]:
        return frozenset({"answer", "references"})


@lru_cache(maxsize=2)  # several checks of a configuration use them
def _previewed(config: ArithmeticConfig, split: Split) -> tuple[Problem, ...]:
    return tuple(_as_problem(problem) for problem in draw_problems(config, split))


def draw_problems(config: ArithmeticConfig, split: Split) -> list[WordProblem]:
    """Draw problems with distinct questions. Raises DataError if the ranges allow too few."""
    count = config.train_problems if split == "train" else config.heldout_problems
    rng = random.Random(f"{config.problem_seed}/{split}")
    problems: dict[str, WordProblem] = {}
    fruitless = 0
    while len(problems) < count and fruitless < _FRUITLESS_DRAWS:
        problem = _draw(config, rng)
        fruitless += 1
        if _split_of(problem.skeleton) == split and problem.question not in problems:
            problems[problem.question] = problem
            fruitless = 0
    if len(problems) == count:
        return list(problems.values())
    raise DataError(
        f"data=arithmetic: only {len(problems)} different {split} problems found with "
        f"max_operand={config.max_operand}, max_value={config.max_value}, "
        f"steps {config.min_steps} to {config.max_steps}; "
        f"ask for fewer than {count} ({split}_problems) or widen the ranges"
    )


def _split_of(skeleton: str) -> Split:
    bucket = hashlib.sha256(skeleton.encode()).digest()[0] % _HELDOUT_BUCKETS
    return "heldout" if bucket == 0 else "train"


def _as_problem(problem: WordProblem) -> Problem:
    digest = hashlib.sha256(problem.question.encode()).hexdigest()[:12]
    return Problem(
        id=f"arithmetic/{digest}",
        messages=(Message("user", problem.question),),
        references=tuple(write_solution(problem.steps, problem.thing, style) for style in STYLES),
        answer=str(problem.answer),
        columns={"situation": problem.situation, "steps": len(problem.steps)},
        origin=f"arithmetic:{problem.skeleton}",
    )


def _draw(config: ArithmeticConfig, rng: random.Random) -> WordProblem:
    situation = rng.choice(SITUATIONS)
    name, pronoun = rng.choice(NAMES)
    words = {"n": name, "p": pronoun, "t": rng.choice(situation.things)}
    length = rng.randint(config.min_steps, config.max_steps)
    amount = rng.randint(2, min(config.max_operand, config.max_value))
    sentences: list[str] = []
    steps: list[Step] = []
    groups = rng.randint(2, config.max_factor)
    if amount <= 10 and amount * groups <= config.max_value and rng.random() < 0.5:
        sentences.append(situation.start_groups.format(a=amount, k=groups, **words))
        steps.append(Step(amount, "*", groups, amount * groups))
    else:
        sentences.append(situation.start.format(a=amount, **words))
    value = steps[-1].result if steps else amount
    while len(steps) < length:
        operator, change = rng.choice(_possible_changes(config, rng, value))
        patterns = {"+": situation.add, "-": situation.subtract, "*": situation.multiply}[operator]
        sentences.append(rng.choice(patterns).format(b=change, k=change, **words))
        result = value + change if operator == "+" else value - change if operator == "-" else value * change
        steps.append(Step(value, operator, change, result))
        value = result
    sentences.append(situation.question.format(**words))
    return WordProblem(situation.name, " ".join(sentences), words["t"], tuple(steps))


def _possible_changes(config: ArithmeticConfig, rng: random.Random, value: int) -> list[tuple[Operator, int]]:
    """Return a change per operator that keeps the value between 0 and `max_value`; + and - are twice as likely."""
    changes: list[tuple[Operator, int]] = []
    if value + 2 <= config.max_value:
        addend = rng.randint(2, min(config.max_operand, config.max_value - value))
        changes += [("+", addend), ("+", addend)]
    if value >= 2:
        subtrahend = rng.randint(2, min(config.max_operand, value))
        changes += [("-", subtrahend), ("-", subtrahend)]
    if 2 <= value <= config.max_operand and 2 * value <= config.max_value:
        changes.append(("*", rng.randint(2, min(config.max_factor, config.max_value // value))))
    return changes


NAMES: tuple[tuple[str, str], ...] = (
    ("Tom", "He"),
    ("Ana", "She"),
    ("Ben", "He"),
    ("Mia", "She"),
    ("Sam", "He"),
    ("Eva", "She"),
    ("Max", "He"),
    ("Lea", "She"),
)
"""(name, pronoun)"""


@dataclass(frozen=True, slots=True)
class Situation:
    """Sentence patterns: `{n}` name, `{p}` pronoun, `{t}` counted thing, `{a}` amount, `{b}` change, `{k}` factor."""

    name: str
    things: tuple[str, ...]
    start: str
    start_groups: str
    """`{k}` groups of `{a}`: the first step is a multiplication."""
    add: tuple[str, ...]
    subtract: tuple[str, ...]
    multiply: tuple[str, ...]
    question: str


SITUATIONS: tuple[Situation, ...] = (
    Situation(
        name="collection",
        things=("apples", "coins", "cards", "shells"),
        start="{n} has {a} {t}.",
        start_groups="{n} has {k} bags of {a} {t}.",
        add=("{p} finds {b} more.", "{p} buys {b} more."),
        subtract=("{p} loses {b}.", "{p} gives away {b}."),
        multiply=("Then {n} gets {k} times as many.",),
        question="How many {t} does {n} have now?",
    ),
    Situation(
        name="bus",
        things=("riders",),
        start="A bus has {a} {t}.",
        start_groups="{k} groups of {a} {t} are on a bus.",
        add=("{b} more get on.",),
        subtract=("{b} get off.",),
        multiply=("Then there are {k} times as many.",),
        question="How many {t} are on the bus now?",
    ),
    Situation(
        name="bakery",
        things=("cakes", "rolls"),
        start="A baker makes {a} {t}.",
        start_groups="A baker makes {k} trays of {a} {t}.",
        add=("The baker makes {b} more.",),
        subtract=("The baker sells {b}.",),
        multiply=("Then the baker makes it {k} times as many.",),
        question="How many {t} does the baker have now?",
    ),
    Situation(
        name="savings",
        things=("dollars",),
        start="{n} saves {a} {t}.",
        start_groups="{n} saves {a} {t} a week for {k} weeks.",
        add=("{p} earns {b} {t}.",),
        subtract=("{p} spends {b} {t}.",),
        multiply=("Then {n} gets {k} times as much.",),
        question="How many {t} does {n} have now?",
    ),
    Situation(
        name="library",
        things=("books",),
        start="A shelf has {a} {t}.",
        start_groups="A library has {k} shelves of {a} {t}.",
        add=("{b} {t} come back.",),
        subtract=("{b} {t} are lent.",),
        multiply=("Then there are {k} times as many.",),
        question="How many {t} are there now?",
    ),
    Situation(
        name="farm",
        things=("hens", "goats"),
        start="A farm has {a} {t}.",
        start_groups="A farm has {k} groups of {a} {t}.",
        add=("The farm buys {b} more.",),
        subtract=("The farm sells {b}.",),
        multiply=("Then the farm has {k} times as many.",),
        question="How many {t} does the farm have now?",
    ),
    Situation(
        name="game",
        things=("points",),
        start="{n} has {a} {t}.",
        start_groups="{n} gets {a} {t} in each of {k} rounds.",
        add=("Then {n} wins {b} {t}.",),
        subtract=("Then {n} loses {b} {t}.",),
        multiply=("Then {n} gets {k} times as many.",),
        question="How many {t} does {n} have now?",
    ),
    Situation(
        name="garden",
        things=("roses", "trees"),
        start="{n} plants {a} {t}.",
        start_groups="{n} plants {k} rows of {a} {t}.",
        add=("{p} plants {b} more.",),
        subtract=("{b} {t} die.",),
        multiply=("Then there are {k} times as many.",),
        question="How many {t} are there now?",
    ),
    Situation(
        name="tank",
        things=("liters",),
        start="A tank has {a} {t}.",
        start_groups="A tank gets {k} cans of {a} {t}.",
        add=("{b} {t} get in.",),
        subtract=("{b} {t} leak.",),
        multiply=("Then there are {k} times as many.",),
        question="How many {t} are in the tank now?",
    ),
)
