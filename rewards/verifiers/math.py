"""`reward=math` (and `rule`, `gsm8k`): 1 if the final answer of a response equals the gold answer, else 0.

Plain numbers are compared here, everything else by math-verify in processes that are killed when they hang.
"""

from __future__ import annotations

import importlib.util
import logging
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field

from rewards.base import Reward, RewardContext, RewardTraits
from rewards.verifiers.answers import (
    MARKERS,
    MAX_ANSWER_CHARACTERS,
    FinalAnswer,
    Marker,
    compare_plain,
    final_answer,
    gold_answer,
    verify_pairs,
    without_units,
)
from rewards.verifiers.pool import Failed, Processes, TextRuleConfig, limit_memory
from rlkit.cluster.processes import die_with_parent
from rlkit.experience import Group, GroupScores, Score, UserError

Pair = tuple[str, str]


def _prepare() -> None:
    die_with_parent()
    # math-verify warns that its own time-outs are off: they are, on purpose.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    verify_pairs([("\\frac{1}{2}", "0.5")])  # builds the LaTeX grammar, which the first parse would wait for
    limit_memory()


class VerifierError(UserError): ...


class Verifier:
    """Judges pairs of cleaned answers and remembers the verdicts.

    >>> verifier = Verifier(processes=1, item_timeout_seconds=5.0, cache_size=1000)
    >>> verifier.verdicts([("1/2", "0.5"), ("3", "4")], budget_seconds=60.0)
    {('1/2', '0.5'): 'right', ('3', '4'): 'wrong'}
    """

    def __init__(self, processes: int, item_timeout_seconds: float, cache_size: int) -> None:
        self._processes = Processes(processes, _prepare, ["math_verify", "rewards.verifiers.math"])
        self._item_timeout = item_timeout_seconds
        self._cache_size = cache_size
        self._cache: OrderedDict[Pair, str] = OrderedDict()

    def start(self, timeout_seconds: float = 60.0) -> None:
        """Judge two known pairs. Raise VerifierError if that fails."""
        if importlib.util.find_spec("math_verify") is None:
            raise VerifierError("math-verify is not installed: pip install 'math-verify[antlr4_9_3]'")
        probes = {("1/2", "0.5"): "right", ("\\frac{3}{4}", "0.5"): "wrong"}
        verdicts = self._judge(list(probes), time.monotonic() + timeout_seconds, timeout_seconds)
        if verdicts != probes:
            raise VerifierError(f"math-verify does not work in its processes: expected {probes}, got {verdicts}")

    def verdicts(self, pairs: Iterable[Pair], budget_seconds: float) -> dict[Pair, str]:
        """Per pair `right`, `wrong`, or why there is no verdict (`timeout: ...`, `crash: ...`).

        Takes about `budget_seconds` at most; pairs not reached by then are `timeout: ...`.
        """
        deadline = time.monotonic() + budget_seconds
        known: dict[Pair, str] = {}
        unknown: list[Pair] = []
        for pair in dict.fromkeys(pairs):
            verdict = self._remembered(pair)
            if verdict is None:
                unknown.append(pair)
            else:
                known[pair] = verdict
        judged = self._judge(unknown, deadline, self._item_timeout) if unknown else {}
        for pair, verdict in judged.items():
            if verdict in ("right", "wrong", "gold_unparsable"):
                self._remember(pair, verdict)
        return known | judged

    def close(self) -> None:
        self._processes.close()

    def _remembered(self, pair: Pair) -> str | None:
        if pair in self._cache:
            self._cache.move_to_end(pair)
            return self._cache[pair]
        answer, gold = pair
        if answer == gold:
            return "right"
        equal = compare_plain(answer, gold)
        return None if equal is None else ("right" if equal else "wrong")

    def _remember(self, pair: Pair, verdict: str) -> None:
        self._cache[pair] = verdict
        if len(self._cache) > self._cache_size:
            self._cache.popitem(last=False)

    def _judge(self, pairs: Sequence[Pair], deadline: float, item_timeout: float) -> dict[Pair, str]:
        results = self._processes.map(verify_pairs, pairs, deadline, item_timeout)
        reasons = (result.reason if isinstance(result, Failed) else result for result in results)
        return dict(zip(pairs, reasons, strict=True))


class MathReward(Reward):
    r"""Compares the response's final answer (`#### x`, `\boxed{x}`, `The answer is x`, `A: x`) with the gold answer.

    A response without an answer scores 0. An answer that the verifier cannot judge (it hangs, dies, or cannot read
    the gold answer) is invalid, with the reason.
    """

    class Config(TextRuleConfig):
        format_weight: float = Field(default=0.0, ge=0)
        """Added to the value of a response that marks its final answer, right or wrong."""
        accept_last_number: bool = False
        """Take the last number of a response that marks no answer."""
        markers: Annotated[tuple[Marker, ...], Field(min_length=1)] = MARKERS
        """What may mark the final answer; the last one counts."""
        strip_units: bool = False
        """Ignore a unit that only one of answer and gold has: `12 m^2` is 12."""
        cache_size: int = Field(default=65536, ge=1)
        """Verdicts remembered; the least recently used are dropped first."""

    @classmethod
    def traits(cls, config: Any) -> RewardTraits:
        return RewardTraits(answer=True, uses_gpu=False)

    def __init__(self, config: Any, context: RewardContext) -> None:
        super().__init__(config, context)
        self._verifier: Verifier | None = None

    def start(self) -> None:
        self._open_verifier().start()

    def score(self, groups: Sequence[Group]) -> list[GroupScores]:
        responses = [sample.text for group in groups for sample in group.samples]
        answers = [group.prompt.answer for group in groups for _ in group.samples]
        scores = iter(self.judge(responses, answers))
        return [GroupScores(tuple(next(scores) for _ in group.samples)) for group in groups]

    def judge(self, responses: Sequence[str], answers: Sequence[str | None]) -> list[Score]:
        """One score per (response, gold answer)."""
        finals = [final_answer(text, self.config.accept_last_number, self.config.markers) for text in responses]
        golds = [None if answer is None else gold_answer(answer) for answer in answers]
        if self.config.strip_units:
            for index, (answer, gold) in enumerate(zip(finals, golds, strict=True)):
                if answer is not None and gold:
                    text, golds[index] = without_units(answer.text, gold)
                    finals[index] = replace(answer, text=text)
        pairs = [
            (answer.text, gold)
            for answer, gold in zip(finals, golds, strict=True)
            if answer is not None and gold and len(answer.text) <= MAX_ANSWER_CHARACTERS
        ]
        # A fifth of the call's deadline is kept for everything else, so that the verifier gives up before it is killed.
        verdicts = self._open_verifier().verdicts(pairs, budget_seconds=0.8 * self.config.timeout_seconds)
        return [self._score(answer, gold, verdicts) for answer, gold in zip(finals, golds, strict=True)]

    def close(self) -> None:
        if self._verifier is not None:
            self._verifier.close()

    def _score(self, answer: FinalAnswer | None, gold: str | None, verdicts: dict[Pair, str]) -> Score:
        if not gold:
            return Score.invalid("no_gold: the prompt has no gold answer")
        if answer is None:
            return self._valid(False, False, "no final answer found")
        if len(answer.text) > MAX_ANSWER_CHARACTERS:
            return self._valid(False, answer.marked, f"the answer is longer than {MAX_ANSWER_CHARACTERS} characters")
        verdict = verdicts[answer.text, gold]
        trace = f"answer {answer.text!r} ({answer.marker}), gold {gold!r}: {verdict}"
        if verdict in ("right", "wrong"):
            return self._valid(verdict == "right", answer.marked, trace)
        if verdict == "gold_unparsable":
            return Score.invalid(f"gold_unparsable: math-verify cannot read the gold answer {gold!r}", trace)
        return Score.invalid(verdict, trace)

    def _valid(self, correct: bool, marked: bool, trace: str) -> Score:
        components = {"correct": float(correct), "format": float(marked)}
        value = components["correct"] + self.config.format_weight * components["format"]
        return Score(value=value, components=components, trace=trace)

    def _open_verifier(self) -> Verifier:
        if self._verifier is None:
            self._verifier = Verifier(self.config.processes, self.config.item_timeout_seconds, self.config.cache_size)
        return self._verifier
