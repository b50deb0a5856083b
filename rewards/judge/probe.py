"""The probe at the start: does the judge answer at all, accept right answers, and refuse those without content?"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from rewards.judge.asking import Judge
from rewards.judge.guard import MASTER_KEYS
from rewards.judge.modes import Rules, share_of_win
from rewards.judge.questions import Material, Question
from rewards.judge.verdicts import NoVerdict
from rlkit.experience import Message

QUESTIONS = (
    ("What is 17 + 26?", "43", "17 + 26 = 43, so the answer is 43."),
    ("What is the capital of Australia?", "Canberra", "The capital of Australia is Canberra."),
    ("How many days does a leap year have?", "366", "A leap year has 366 days."),
)
"""(question, reference, right response)"""
ACCEPTED = 0.5
"""A value from here on is a yes; so is a share of the win over a right response."""


class JudgeError(RuntimeError):
    """The judge cannot be used; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """False positive rate of every master key, and which right responses were not accepted."""

    rates: dict[str, float]
    missed: tuple[str, ...]


async def probe(judge: Judge, rules: Rules, principle: str, show_reference: bool, deadline: float) -> ProbeResult:
    """Ask about every master key on every question. Raises JudgeError if the judge cannot be asked or understood."""
    found = await asyncio.gather(
        *(_on_question(judge, rules, principle, show_reference, i, deadline) for i in range(len(QUESTIONS)))
    )
    rates = {key: sum(key in accepted for accepted, _ in found) / len(found) for key in MASTER_KEYS}
    return ProbeResult(
        rates, tuple(question for (question, *_), (_, right) in zip(QUESTIONS, found, strict=True) if not right)
    )


async def _on_question(
    judge: Judge, rules: Rules, principle: str, show_reference: bool, place: int, deadline: float
) -> tuple[set[str], bool]:
    """Master keys that are accepted as an answer to this question, and whether the right one is."""
    question, reference, right = QUESTIONS[place]
    material = Material(principle, (Message("user", question),), reference if show_reference else None)
    if rules.mode == "pairwise":
        found = await asyncio.gather(*(share_of_win(judge, rules, material, k, right, deadline) for k in MASTER_KEYS))
        shares = [share[0] for share in found if not isinstance(share, NoVerdict)]
        _raise_first(found)
        return {key for key, share in zip(MASTER_KEYS, shares, strict=True) if share >= ACCEPTED}, True
    texts = (right, *MASTER_KEYS)
    if rules.mode == "listwise":
        questions = [Question(material, texts, rules.form(len(texts)))]
    else:
        questions = [Question(material, (text,), rules.form(1)) for text in texts]
    verdicts = await asyncio.gather(*(judge.ask(question, deadline) for question in questions))
    _raise_first(verdicts)
    first, *others = (value for verdict in verdicts if not isinstance(verdict, NoVerdict) for value in verdict.values)
    return {key for key, value in zip(MASTER_KEYS, others, strict=True) if value >= ACCEPTED}, first >= ACCEPTED


async def ask_once(judge: Judge, rules: Rules, principle: str, deadline: float) -> None:
    """One question, to see that the judge answers and can be read. Raises JudgeError if not."""
    question, _, right = QUESTIONS[0]
    material = Material(principle, (Message("user", question),))
    responses = (right,) if rules.mode == "pointwise" else (right, QUESTIONS[1][2])
    _raise_first([await judge.ask(Question(material, responses, rules.form(len(responses))), deadline)])


def complaint(result: ProbeResult, max_rate: float) -> str:
    """What is wrong with the judge, or an empty string."""
    fooled = {key: rate for key, rate in result.rates.items() if rate > max_rate}
    found = []
    if fooled:
        shown = ", ".join(f"{key!r} in {rate:.0%}" for key, rate in sorted(fooled.items(), key=lambda kv: -kv[1]))
        found.append(
            f"it accepts responses without content ({shown} of {len(QUESTIONS)} questions), which a policy would learn "
            "to write"
        )
    if result.missed:
        found.append(f"it does not accept the right answer to {' and '.join(map(repr, result.missed))}")
    return "; ".join(found)


def _raise_first(found: Sequence[object]) -> None:
    for item in found:
        if isinstance(item, NoVerdict):
            raise JudgeError(item.reason)
