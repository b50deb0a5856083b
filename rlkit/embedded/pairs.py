"""Fine-tuning triplets for the embedded discriminator: right and wrong answers to one problem."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import product

from rlkit.data.arithmetic import STYLES, Style, WordProblem, write_solution
from rlkit.embedded.candidates import right_answer, wrong_answer
from rlkit.embedded.careless import slip
from rlkit.embedded.judging import is_right
from rlkit.embedded.scale import Variant
from rlkit.polar_training.triplets import Triplet

SAMPLED_SHARE = 0.5
"""Share of fine-tuning candidates taken from policies, where a problem has them; the rest are written by rule."""


LARGEST_GUESS = 41
CANDIDATES = 4
"""Right answers, and wrong ones, drawn for a problem at a time: they share prompt and reference, so this is cheap."""


def last_line(text: str) -> str:
    """What stands after the last line break."""
    return text.rsplit("\n", 1)[-1]


def phrasing(variant: Variant) -> str:
    """What policies that are told apart share."""
    return variant.style


def final_answers(problems: Sequence[WordProblem], seed: int) -> Iterator[list[Triplet]]:
    """Per problem the right last line against four wrong ones, and nothing else to go by; for ever.

    Reading and comparing two numbers is learnt from these in a tenth of the time that whole solutions take.
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
    """Reference: the gold solution in any phrasing. Chosen: judged right. Rejected: judged wrong. For ever.

    CANDIDATES right and as many wrong answers to a problem come as all their pairs, in one list.

    `sampled` holds policies' answers to each problem. `crossed` fixes whether the candidates' phrasing differs from
    the reference's (None: any); it binds only candidates written by rule.
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
        for found, taken, write in zip(candidates, (right, wrong), (right_answer, wrong_answer), strict=True):
            for _ in range(CANDIDATES):
                from_policy = taken and rng.random() < SAMPLED_SHARE
                found.append(rng.choice(taken) if from_policy else write(problem, rng.choice(others), rng))
        yield [Triplet(problem.question, reference, *pair) for pair in product(*candidates)]
