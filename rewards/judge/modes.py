"""The three ways to judge a group: each response alone, two at a time, all at once. Values lie in 0 to 1."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rewards.judge.questions import Material, Question, shuffled
from rewards.judge.verdicts import Form, NoVerdict, Verdict

if TYPE_CHECKING:
    from rewards.judge.asking import Judge

Mode = Literal["pointwise", "pairwise", "listwise"]
Against = Literal["group", "reference"]
LEAST_COMPARED = 0.5
"""Share of a response's comparisons that must have a verdict."""


@dataclass(frozen=True, slots=True)
class Judged:
    """What was found out about one text."""

    value: float | None
    """None: it could not be judged."""
    note: str
    """The judge's reasoning, or the reason why there is no value."""


@dataclass(frozen=True, slots=True)
class Rules:
    """How groups are judged."""

    mode: Mode
    low: float
    high: float
    against: Against
    neighbours: int | None
    swap: bool
    reasons: bool
    seed: int

    def form(self, responses: int) -> Form:
        """The verdict asked for in one call about so many responses."""
        if self.mode == "pairwise":
            return Form("winner", responses, reasons=self.reasons)
        return Form("scores", responses, self.low, self.high, self.reasons)


@dataclass(frozen=True, slots=True)
class Findings:
    """What was found out about the different texts of one group."""

    judged: Mapping[str, Judged]
    wins: Mapping[tuple[str, str], float]
    """(first, second) -> first's share of the win, for texts that were compared."""


async def judge_texts(
    judge: Judge, rules: Rules, material: Material, texts: Sequence[str], deadline: float
) -> Findings:
    """Judge different texts. `material.reference` is what they are compared with if `rules.against` says so."""
    if rules.mode == "pointwise":
        return Findings(await _alone(judge, rules, material, texts, deadline), {})
    if rules.mode == "listwise":
        return Findings(await _together(judge, rules, material, texts, deadline), {})
    if rules.against == "reference":
        return Findings(await _against_reference(judge, rules, material, texts, deadline), {})
    return await _against_each_other(judge, rules, material, texts, deadline)


async def share_of_win(
    judge: Judge, rules: Rules, material: Material, first: str, second: str, deadline: float
) -> tuple[float, str] | NoVerdict:
    """First's share of the win over second and the judge's reasoning.

    Both orders are asked if `rules.swap`: a judge that always prefers the response it reads first gives 1/2.
    """
    orders = [(first, second), (second, first)] if rules.swap else [(first, second)]
    asked = [judge.ask(Question(material, order, rules.form(2)), deadline) for order in orders]
    found = await asyncio.gather(*asked)
    shares = []
    for order, verdict in zip(orders, found, strict=True):
        if isinstance(verdict, NoVerdict):
            return verdict
        shares.append(verdict.values[order.index(first)])
    return sum(shares) / len(shares), "\n".join(v.reasoning for v in found if isinstance(v, Verdict))


async def _alone(
    judge: Judge, rules: Rules, material: Material, texts: Sequence[str], deadline: float
) -> dict[str, Judged]:
    found = await asyncio.gather(*(judge.ask(Question(material, (text,), rules.form(1)), deadline) for text in texts))
    return {
        text: Judged(None, v.reason) if isinstance(v, NoVerdict) else Judged(v.values[0], v.reasoning)
        for text, v in zip(texts, found, strict=True)
    }


async def _together(
    judge: Judge, rules: Rules, material: Material, texts: Sequence[str], deadline: float
) -> dict[str, Judged]:
    """One call. The order in it is shuffled by content, so that a place in the group is worth nothing."""
    order = shuffled(texts, material, rules.seed)
    question = Question(material, tuple(order), rules.form(len(order)))
    verdict = await judge.ask(question, deadline)
    if isinstance(verdict, NoVerdict):
        return {text: Judged(None, verdict.reason) for text in texts}
    return {text: Judged(value, verdict.reasoning) for text, value in zip(order, verdict.values, strict=True)}


async def _against_reference(
    judge: Judge, rules: Rules, material: Material, texts: Sequence[str], deadline: float
) -> dict[str, Judged]:
    reference = material.reference or ""
    blind = Material(material.principle, material.conversation)  # the judge must not know which one it is
    found = await asyncio.gather(
        *(share_of_win(judge, rules, blind, text, reference, deadline) for text in texts if text != reference)
    )
    others = iter(found)
    judged = {}
    for text in texts:
        share = (0.5, "equal to the reference") if text == reference else next(others)
        judged[text] = Judged(None, share.reason) if isinstance(share, NoVerdict) else Judged(*share)
    return judged


async def _against_each_other(
    judge: Judge, rules: Rules, material: Material, texts: Sequence[str], deadline: float
) -> Findings:
    pairs = opponents(shuffled(texts, material, rules.seed), rules.neighbours)
    found = await asyncio.gather(*(share_of_win(judge, rules, material, *pair, deadline) for pair in pairs))
    shares: dict[str, list[float]] = {text: [] for text in texts}
    failures: dict[str, list[str]] = {text: [] for text in texts}
    notes: dict[str, str] = {}
    wins: dict[tuple[str, str], float] = {}
    for (first, second), share in zip(pairs, found, strict=True):
        if isinstance(share, NoVerdict):
            failures[first].append(share.reason)
            failures[second].append(share.reason)
            continue
        wins[first, second] = share[0]
        shares[first].append(share[0])
        shares[second].append(1 - share[0])
        notes.setdefault(first, share[1])
        notes.setdefault(second, share[1])
    judged = {}
    for text in texts:
        won, failed = shares[text], failures[text]
        if failed and len(won) < LEAST_COMPARED * (len(won) + len(failed)):
            judged[text] = Judged(None, failed[0])
        else:
            judged[text] = Judged(sum(won) / len(won) if won else None, notes.get(text, ""))
    return Findings(judged, wins)


def opponents(texts: Sequence[str], neighbours: int | None) -> list[tuple[str, str]]:
    """Who is compared with whom: everyone with everyone, or each with the next `neighbours` in a ring."""
    count = len(texts)
    if neighbours is None or 2 * neighbours >= count - 1:
        return list(itertools.combinations(texts, 2))
    return [(texts[i], texts[(i + step) % count]) for i in range(count) for step in range(1, neighbours + 1)]
