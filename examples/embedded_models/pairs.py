"""Right and wrong answers of many kinds, labelled by the rule, and fine-tuning triplets made from them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product

import numpy as np

from examples.embedded_models.corpora import careless_solution, careless_steps, recalculate, slip
from examples.embedded_models.scale import Variant
from rewards.polar.triplets import Triplet
from rewards.verifiers.answers import final_answer
from rewards.verifiers.numerals import compare_plain
from rlkit.data.arithmetic import STYLES, Operator, Step, Style, WordProblem, write_solution


def is_right(answer: str, gold: int) -> bool:
    """Whether the gold number is marked as the final answer."""
    final = final_answer(answer)
    return final is not None and compare_plain(final.text, str(gold)) is True


def correctness(problems: Sequence[WordProblem], answers: Sequence[Sequence[str]]) -> np.ndarray:
    """Return [problems, answers] bool."""
    return np.array(
        [[is_right(text, problem.answer) for text in texts] for problem, texts in zip(problems, answers, strict=True)]
    )


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
    """Write wrong steps with the right answer, which is right by the rule."""
    steps = write_solution(careless_steps(problem.steps, 0.5, rng), problem.thing, style).splitlines()[:-1]
    return "\n".join([*steps, f"#### {problem.answer}"])


def _slips(problem: WordProblem, style: Style, rng: random.Random) -> str:
    return careless_solution(problem, style, 0.5, rng)


def _wrong_last_line(problem: WordProblem, style: Style, rng: random.Random) -> str:
    lines = write_solution(problem.steps, problem.thing, style).splitlines()
    return "\n".join([*lines[:-1], f"#### {slip(problem.steps[-1], rng)}"])


def _misread(problem: WordProblem, style: Style, rng: random.Random) -> str:
    """Write a solution with one number or operation misread and the rest right."""
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
    """Write a right solution and then wrong answers; the last answer counts."""
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
"""Kinds of answers and their probabilities."""


def right_answer(problem: WordProblem, style: Style, rng: random.Random) -> str:
    """Write an answer that is right by the rule."""
    return _draw(RIGHT, problem, style, rng, right=True)


def wrong_answer(problem: WordProblem, style: Style, rng: random.Random) -> str:
    """Write an answer that is wrong by the rule, mostly a near miss."""
    return _draw(WRONG, problem, style, rng, right=False)


def _draw(
    kinds: tuple[tuple[Writer, float], ...], problem: WordProblem, style: Style, rng: random.Random, right: bool
) -> str:
    writers, weights = zip(*kinds, strict=True)
    while True:
        text: str = rng.choices(writers, weights)[0](problem, style, rng)
        if is_right(text, problem.answer) == right:
            return text


SAMPLED_SHARE = 0.5
"""Share of fine-tuning candidates from policies, if a problem has any; the rest are written by rule."""


LARGEST_GUESS = 41
CANDIDATES = 4
"""Right answers, and as many wrong ones, per problem and draw; cheap because they share prompt and reference."""


def last_line(text: str) -> str:
    return text.rsplit("\n", 1)[-1]


def phrasing(variant: Variant) -> str:
    """Return the phrasing, which policies that POLAR must distinguish share."""
    return variant.style


def final_answers(problems: Sequence[WordProblem], seed: int) -> Iterator[list[Triplet]]:
    """Yield, per problem, the right last line against four wrong ones, endlessly.

    From these, reading and comparing two numbers is learnt in a tenth of the time that whole solutions take.
    """
    rng = random.Random(f"final/{seed}")
    while True:
        for problem in rng.sample(problems, len(problems)):
            wrong: dict[int, None] = {}
            while len(wrong) < CANDIDATES:
                number = slip(problem.steps[-1], rng) if rng.random() < 0.5 else rng.randrange(LARGEST_GUESS)
                if number != problem.answer:
                    wrong[number] = None
            reference = write_solution(problem.steps, problem.thing, rng.choice(STYLES))
            chosen = f"#### {problem.answer}"
            yield [Triplet(problem.question, reference, chosen, f"#### {number}") for number in wrong]


def labelled_triplets(
    problems: Sequence[WordProblem], sampled: Sequence[Sequence[str]], seed: int, crossed: bool | None = None
) -> Iterator[list[Triplet]]:
    """Yield, per problem, all pairs of CANDIDATES right and as many wrong answers, endlessly.

    The reference is the gold solution in any phrasing. `sampled` holds policies' answers by problem. `crossed` fixes
    whether the phrasing of candidates written by rule differs from the reference's (None: any).
    """
    rng = random.Random(f"labelled/{seed}")
    judged = [
        ([text for text in texts if is_right(text, p.answer)], [text for text in texts if not is_right(text, p.answer)])
        for p, texts in zip(problems, sampled, strict=True)
    ]
    order: list[int] = []
    while True:
        if not order:
            order = rng.sample(range(len(problems)), len(problems))
        index = order.pop()
        problem, (right, wrong) = problems[index], judged[index]
        style: Style = rng.choice(STYLES)
        others = [other for other in STYLES if (other != style) is crossed] if crossed is not None else STYLES

        reference = write_solution(problem.steps, problem.thing, style)
        candidates: tuple[list[str], list[str]] = ([], [])
        for texts, taken, write in zip(candidates, (right, wrong), (right_answer, wrong_answer), strict=True):
            for _ in range(CANDIDATES):
                from_policy = taken and rng.random() < SAMPLED_SHARE
                texts.append(rng.choice(taken) if from_policy else write(problem, rng.choice(others), rng))
        yield [Triplet(problem.question, reference, *pair) for pair in product(*candidates)]
