"""`reward=judge`: judges responses by a principle in words, one by one, in pairs, or as a group."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from rewards.base import RewardContext, RewardTraits
from rewards.judge.base import Asked, BaseJudge, judge_score, mean_scores
from rewards.judge.master_keys import Probe
from rewards.judge.prompts import PRINCIPLE, Against, AnswerFormat, Material, Mode, Rules
from rewards.judge.question import CannotJudge, Question
from rlkit.experience import GroupScores, PreferencePair, Prompt, Score

PAIRWISE_ONLY = ("against", "neighbours", "swap")
LEAST_COMPARED = 0.5
"""Minimum share of a response's comparisons that must have a verdict."""


class JudgeReward(BaseJudge):
    """Values from 0 (worst) to 1 (best) by a principle: a score, or the share of wins."""

    class Config(BaseJudge.Config):
        mode: Mode = "pointwise"
        """pointwise: score each response alone; pairwise: share of wins; listwise: the whole group in one call."""
        principle: str = PRINCIPLE
        """The rubric: what makes a response good, in words."""
        principle_column: str | None = None
        """Data column with each prompt's principle; if it is empty, `principle` applies."""
        reference: Literal["never", "if_given", "required"] = "if_given"
        """Whether the judge sees the prompt's first reference or, if it has none, its gold answer."""
        low: float = 1.0
        """pointwise, listwise: the worst score on the judge's scale."""
        high: float = 10.0
        """pointwise, listwise: the best score on the judge's scale."""
        against: Against = "group"
        """pairwise: compare with the rest of the group, or with the prompt's first reference."""
        neighbours: int | None = Field(default=None, ge=1)
        """pairwise in the group: compare each response with this many that follow it in a shuffled ring, which gives it
        twice as many opponents; null: compare all pairs."""
        swap: bool = True
        """pairwise: ask in both orders, which cancels the judge's position bias."""
        answer_format: AnswerFormat = "json_schema"
        """Form of the verdict: json_schema (guided decoding), json_object, or text (its last line)."""
        reasons: bool = True
        """Ask for reasons before the verdict. false is cheaper and suits judges that reason before they answer."""

        @model_validator(mode="after")
        def _scale_and_reference(self) -> Self:
            if self.low >= self.high:
                raise ValueError(f"low={self.low:g} must be below high={self.high:g}")
            if self.mode == "pairwise" and self.against == "reference" and self.reference == "never":
                raise ValueError("against=reference needs a reference: reference=never contradicts it")
            return self

        def unused(self) -> list[str]:
            if self.mode != "pairwise":
                return [*PAIRWISE_ONLY, *super().unused()]
            ring = ["neighbours"] if self.against == "reference" else []
            return ["low", "high", *ring, *super().unused()]

    def __init__(self, config: Any, context: RewardContext) -> None:
        super().__init__(config, context)
        shared = ("mode", "low", "high", "against", "neighbours", "swap", "reasons", "answer_format")
        self._rules = Rules(**{name: getattr(config, name) for name in shared}, seed=context.seed)

    @classmethod
    def traits(cls, config: Any) -> RewardTraits:
        against_reference = config.mode == "pairwise" and config.against == "reference"
        return replace(
            super().traits(config),
            references=config.reference == "required" or against_reference,
            columns=() if config.principle_column is None else (config.principle_column,),
            samples=2 if config.mode == "pairwise" and not against_reference else 1,
            judges_texts=config.mode == "pointwise" or against_reference,
        )

    def questions(self, prompt: Prompt, responses: Sequence[str]) -> list[Question]:
        return self._rules.questions(self._material(prompt), responses)

    async def _judge_group(
        self, prompt: Prompt, texts: Sequence[str], decided: Mapping[str, Score], deadline: float
    ) -> GroupScores:
        if self._rules.mode == "pairwise" and self._rules.against == "reference":
            reference = self._material(prompt).reference or ""
            decided = {reference: judge_score(0.5, "equal to the reference"), **decided}
        return await super()._judge_group(prompt, texts, decided, deadline)

    def combine(self, texts: Sequence[str], decided: Mapping[str, Score], asked: Asked) -> GroupScores:
        if self._rules.mode == "pairwise" and self._rules.against == "group":
            return win_rates(texts, decided, asked)
        return super().combine(texts, decided, asked)

    def probes(self) -> list[Probe]:
        """Return the probes; pairwise, each response without content is compared with the right response."""
        probes = super().probes()
        if self._rules.mode != "pairwise":
            return list(probes)
        if self._rules.against == "reference":
            return [replace(probe, prompt=replace(probe.prompt, references=(probe.right,))) for probe in probes]
        return [replace(probe, rejects=(key,)) for probe in probes for key in probe.rejects]

    def _material(self, prompt: Prompt) -> Material:
        config = self.config
        principle = config.principle
        if config.principle_column is not None:
            own = prompt.columns.get(config.principle_column)
            if own is not None and not isinstance(own, str):
                raise CannotJudge(f"no_principle: {config.principle_column} holds a {type(own).__name__}, not a text")
            principle = own or principle
        reference = prompt.references[0] if prompt.references else prompt.answer
        if self.traits(config).references and not prompt.references:
            raise CannotJudge("no_reference: the prompt has no reference answer")
        return Material(principle, prompt.messages, None if config.reference == "never" else reference)


def win_rates(texts: Sequence[str], decided: Mapping[str, Score], asked: Asked) -> GroupScores:
    """Return shares of wins. A response rejected by rule loses to every other; equal responses share the win."""
    verdicts: dict[frozenset[str], list[tuple[Question, Any]]] = {}
    for question, verdict in asked:
        verdicts.setdefault(frozenset(question.responses), []).append((question, verdict))
    pairs = {both: mean_scores(orders) for both, orders in verdicts.items()}
    rejected = {text for text, score in decided.items() if score.valid}

    def share(first: str, second: str) -> float | None:
        if first == second or {first, second} <= rejected:
            return 0.5
        if rejected & {first, second}:
            return float(second in rejected)
        pair = pairs.get(frozenset((first, second)))
        return pair[first].value if pair else None

    def score(index: int, text: str) -> Score:
        if text in decided:
            return decided[text]
        compared = [pair[text] for pair in pairs.values() if text in pair]
        known = [comparison for comparison in compared if comparison.valid]
        if len(known) < LEAST_COMPARED * len(compared):
            return next(comparison for comparison in compared if not comparison.valid)
        shares = [share(text, other) for other in (*texts[:index], *texts[index + 1 :])]
        won = [value for value in shares if value is not None]
        if not won:
            return Score.invalid("no_opponent: there is no other response to compare it with")
        return judge_score(sum(won) / len(won), known[0].trace if known else "")

    scores = tuple(score(index, text) for index, text in enumerate(texts))
    preferences = []
    for i, j in itertools.combinations(range(len(texts)), 2):
        won = share(texts[i], texts[j]) if scores[i].valid and scores[j].valid else None
        if won is not None and won != 0.5:
            preferences.append(PreferencePair(i, j, won) if won > 0.5 else PreferencePair(j, i, 1 - won))
    return GroupScores(scores, tuple(preferences))
