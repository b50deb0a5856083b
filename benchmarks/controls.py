"""Parts that only benchmarks use: controls whose reward says nothing about the answer, and a reward without cost."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rewards.base import Reward
from rewards.environment import EnvironmentReward
from rlkit.data.arithmetic import Arithmetic
from rlkit.data.base import BadRow, Problem, Split
from rlkit.experience import Group, GroupScores, Score


class ShuffledReferences(Arithmetic):
    """The embedded task, but every training problem carries the references of another one."""

    def load(self, split: Split) -> tuple[list[Problem], list[BadRow]]:
        """Held-out problems stay as they are: they are judged by their gold answers only."""
        problems, bad = super().load(split)
        if split == "train":
            others = list(problems)
            random.Random(self.seed).shuffle(others)
            problems = [
                replace(problem, references=other.references) for problem, other in zip(problems, others, strict=True)
            ]
        return problems, bad


class ShuffledRewards(EnvironmentReward):
    """What the environment gave, dealt anew among the samples of each group: the same rewards, at random."""

    def score(self, groups: Sequence[Group]) -> list[GroupScores]:
        shuffled = []
        for group, scores in zip(groups, super().score(groups), strict=True):
            values = [score.value for score in scores.samples]
            random.Random(group.id).shuffle(values)
            pairs = zip(scores.samples, values, strict=True)
            # Turns' rewards belong to the tokens of their own sample, so they are left out.
            shuffled.append(GroupScores(tuple(replace(score, value=v, span_rewards=()) for score, v in pairs)))
        return shuffled


def write_random_discriminator(trained: Path, folder: Path, seed: int) -> Path:
    """A discriminator of the trained one's shape and tokenizer with freshly drawn weights."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(seed)
    AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(trained)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(trained).save_pretrained(folder)
    return folder


class LetterReward(Reward):
    """Share of lower-case letters: costs nothing, so that a benchmark times the framework alone."""

    def score(self, groups: Sequence[Group]) -> list[GroupScores]:
        """See the class."""
        return [GroupScores(tuple(_letters(sample.text) for sample in group.samples)) for group in groups]


def _letters(text: str) -> Score:
    return Score(value=sum(map(str.islower, text)) / max(1, len(text)))
