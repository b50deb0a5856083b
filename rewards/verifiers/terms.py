"""`reward=length`, `group_length` and `repetition`: terms to combine with other rewards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pydantic import Field, model_validator

from rewards.base import Reward, RewardConfig, RewardTraits
from rlkit.experience import Group, GroupScores, Score


class TokenReward(Reward):
    @classmethod
    def traits(cls, config: Any) -> RewardTraits:
        return RewardTraits(judges_texts=False, uses_gpu=False)


class Length(TokenReward):
    """1 for a response of `min_tokens` to `max_tokens`; the value falls to 0 over `slope_tokens` on either side.

    value = clip(1 - (tokens outside) / slope_tokens, 0, 1).
    """

    class Config(RewardConfig):
        min_tokens: int = Field(default=0, ge=0)
        """Shorter responses lose value."""
        max_tokens: int | None = Field(default=None, ge=1)
        """Longer responses lose value; null: no upper bound."""
        slope_tokens: int = Field(default=128, ge=1)
        """Number of tokens outside the bounds over which the value falls from 1 to 0."""

        @model_validator(mode="after")
        def _some_bound(self) -> Length.Config:
            if self.max_tokens is None and self.min_tokens == 0:
                raise ValueError("set reward.max_tokens, reward.min_tokens or both")
            if self.max_tokens is not None and self.max_tokens < self.min_tokens:
                raise ValueError(f"reward.max_tokens={self.max_tokens} is below reward.min_tokens={self.min_tokens}")
            return self

    def score(self, groups: Sequence[Group]) -> list[GroupScores]:
        return [GroupScores(tuple(self._score(sample.length) for sample in group.samples)) for group in groups]

    def _score(self, tokens: int) -> Score:
        config = self.config
        excess = max(config.min_tokens - tokens, 0)
        if config.max_tokens is not None:
            excess = max(excess, tokens - config.max_tokens)
        value = max(0.0, 1.0 - excess / config.slope_tokens)
        return Score(value, components={"length": value}, trace=f"{tokens} tokens")


class GroupLength(TokenReward):
    """The shortest response of a group gets 1, the longest 0, others in between (Kimi k1.5, arXiv 2501.12599).

    value = 1 - (tokens - shortest) / (longest - shortest), which is the paper's plus 0.5; 0.5 if all have equal length.
    """

    @classmethod
    def traits(cls, config: Any) -> RewardTraits:
        return replace(super().traits(config), samples=2)

    def score(self, groups: Sequence[Group]) -> list[GroupScores]:
        return [self._group(group) for group in groups]

    def _group(self, group: Group) -> GroupScores:
        lengths = [sample.length for sample in group.samples]
        shortest, longest = min(lengths, default=0), max(lengths, default=0)
        scores = []
        for tokens in lengths:
            value = 0.5 if longest == shortest else (longest - tokens) / (longest - shortest)
            trace = f"{tokens} tokens, {shortest} to {longest} in the group"
            scores.append(Score(value, components={"length": value}, trace=trace))
        return GroupScores(tuple(scores))


class Repetition(TokenReward):
    """1 minus the share of repeated n-grams of tokens: 1 without repetition, near 0 for a loop.

    The n-gram penalty of "Demystifying Long Chain-of-Thought" (arXiv 2502.03373): an n-gram that occurred earlier in
    the response is repeated.
    """

    class Config(RewardConfig):
        ngram_tokens: int = Field(default=8, ge=1)
        """Length of the n-grams. Short n-grams also count ordinary phrases; a response shorter than this gets 1."""

    def score(self, groups: Sequence[Group]) -> list[GroupScores]:
        said = [[sample.token_ids[sample.trained].tolist() for sample in group.samples] for group in groups]
        return [GroupScores(tuple(map(self._score, responses))) for responses in said]

    def _score(self, tokens: list[int]) -> Score:
        total, repeated = repeated_ngrams(tokens, self.config.ngram_tokens)
        value = 1.0 - repeated / total if total else 1.0
        trace = f"{repeated} of {total} {self.config.ngram_tokens}-grams are repeated"
        return Score(value, components={"distinct": value}, trace=trace)


def repeated_ngrams(tokens: Sequence[int], size: int) -> tuple[int, int]:
    """Return the numbers of all n-grams and of repeated ones."""
    total = max(0, len(tokens) - size + 1)
    return total, total - len({tuple(tokens[start : start + size]) for start in range(total)})
