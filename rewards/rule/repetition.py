"""`reward=repetition`: how much of a response repeats itself, to be combined with other rewards."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from rewards.base import RewardConfig
from rewards.rule.token_reward import TokenReward
from rlkit.experience import Group, GroupScores, Score


class Repetition(TokenReward):
    """1 minus the share of repeated n-grams of tokens: 1 without repetition, near 0 for a loop.

    The n-gram penalty of "Demystifying Long Chain-of-Thought" (arXiv 2502.03373) as a term of the outcome: an n-gram
    that already stood earlier in the response is a repeated one. Weight w in a sum makes it a penalty of at most w.
    """

    class Config(RewardConfig):
        """Options of the repetition reward."""

        ngram_tokens: int = Field(default=8, ge=1)
        """Tokens in an n-gram. Short ones also count ordinary phrases; a response shorter than this gets 1."""

    def score(self, groups: Sequence[Group]) -> list[GroupScores]:
        """Component `distinct`: the value; the trace says how many n-grams are repeated."""
        return [
            GroupScores(tuple(self._score(sample.token_ids.tolist()) for sample in group.samples)) for group in groups
        ]

    def _score(self, tokens: list[int]) -> Score:
        total, repeated = repeated_ngrams(tokens, self.config.ngram_tokens)
        value = 1.0 - repeated / total if total else 1.0
        trace = f"{repeated} of {total} {self.config.ngram_tokens}-grams are repeated"
        return Score(value, components={"distinct": value}, trace=trace)


def repeated_ngrams(tokens: Sequence[int], size: int) -> tuple[int, int]:
    """All n-grams and those that already stood earlier in the same response."""
    total = max(0, len(tokens) - size + 1)
    return total, total - len({tuple(tokens[start : start + size]) for start in range(total)})
