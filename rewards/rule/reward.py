"""`reward=rule`: 1 if the final answer equals the gold answer, else 0, judged by math-verify."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from rewards.base import Reward, RewardContext, RewardNeeds
from rewards.rule.math import (
    MARKERS,
    MAX_ANSWER_CHARACTERS,
    FinalAnswer,
    Marker,
    final_answer,
    gold_answer,
    without_units,
)
from rewards.rule.text_rule import TextRuleConfig
from rlkit.experience import Group, GroupScores, Score

if TYPE_CHECKING:
    from rewards.rule.verifier import Verifier


class RuleReward(Reward):
    r"""Compares the response's final answer (`#### x`, `\boxed{x}`, `The answer is x`, `A: x`) with the gold answer.

    A response without an answer scores 0: that is the model's failure. An answer that the verifier cannot judge
    (it hangs, dies, or cannot read the gold answer) is invalid, with the reason.
    """

    class Config(TextRuleConfig):
        """Options of the rule reward."""

        format_weight: float = Field(default=0.0, ge=0)
        """Added to the value of a response that marks its final answer, right or wrong."""
        accept_last_number: bool = False
        """Take the last number of a response that marks no answer."""
        markers: Annotated[tuple[Marker, ...], Field(min_length=1)] = MARKERS
        """What may mark the final answer; of several, the last one in the response counts."""
        strip_units: bool = False
        """A unit that only one of answer and gold has does not matter, in boxes, too: `12 m^2` is 12."""
        cache_size: int = Field(default=65536, ge=1)
        """Verdicts remembered, the least recently used dropped first."""

    @classmethod
    def needs(cls, config: Any) -> RewardNeeds:
        """The gold answer."""
        return RewardNeeds(answer=True)

    @classmethod
    def uses_gpu(cls, config: Any) -> bool:
        """No: the verifier is a program."""
        return False

    def __init__(self, config: Any, context: RewardContext) -> None:
        super().__init__(config, context)
        self._verifier: Verifier | None = None

    def start(self) -> None:
        """Start the verifier processes and let them judge a known pair."""
        self._open_verifier().start()

    def score(self, groups: Sequence[Group]) -> list[GroupScores]:
        """Judge every response against its prompt's gold answer."""
        responses = [sample.text for group in groups for sample in group.samples]
        answers = [group.prompt.answer for group in groups for _ in group.samples]
        scores = iter(self.judge(responses, answers))
        return [GroupScores(tuple(next(scores) for _ in group.samples)) for group in groups]

    def judge(self, responses: Sequence[str], answers: Sequence[str | None]) -> list[Score]:
        """One score per (response, gold answer). Components: `correct` and `format` (an answer is marked)."""
        found = [final_answer(text, self.config.accept_last_number, self.config.markers) for text in responses]
        golds = [None if answer is None else gold_answer(answer) for answer in answers]
        if self.config.strip_units:
            for place, (answer, gold) in enumerate(zip(found, golds, strict=True)):
                if answer is not None and gold:
                    text, golds[place] = without_units(answer.text, gold)
                    found[place] = replace(answer, text=text)
        pairs = [
            (answer.text, gold)
            for answer, gold in zip(found, golds, strict=True)
            if answer is not None and gold and len(answer.text) <= MAX_ANSWER_CHARACTERS
        ]
        # A fifth of the call's deadline is kept for everything else, so that the verifier gives up before it is killed.
        verdicts = self._open_verifier().verdicts(pairs, budget_seconds=0.8 * self.config.timeout_seconds)
        return [self._score(answer, gold, verdicts) for answer, gold in zip(found, golds, strict=True)]

    def close(self) -> None:
        """End the verifier processes."""
        if self._verifier is not None:
            self._verifier.close()

    def _score(self, answer: FinalAnswer | None, gold: str | None, verdicts: dict[tuple[str, str], str]) -> Score:
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
            from rewards.rule.verifier import Verifier  # pebble and multiprocessing load only where a reward runs

            self._verifier = Verifier(self.config.processes, self.config.item_timeout_seconds, self.config.cache_size)
        return self._verifier


def judge(responses: Sequence[str], answers: Sequence[str | None]) -> list[Score]:
    """Rule scores of responses against gold answers, for evaluation: whatever trained the policy, this judges it."""
    reward = RuleReward(RuleReward.Config(), RewardContext())
    try:
        return reward.judge(responses, answers)
    finally:
        reward.close()
