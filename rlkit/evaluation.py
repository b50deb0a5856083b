"""Held-out accuracy: one response per held-out prompt, scored by the run's verifier, never trained on."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlkit.experience import Group, Prompt, Score
from rlkit.experience.scores import RewardFailed, ScoreReport, check_failures
from rlkit.rollout.pool import RolloutPool
from rlkit.rollout.worker import GroupRequest
from rlkit.serving.pool import RewardPool


@dataclass(frozen=True)
class Evaluation:
    accuracy: float
    """Share of right answers among the judged ones, 0 to 1."""
    metrics: Mapping[str, float]


class Evaluator:
    """Samples with the rollout workers at their temperature and scores with the verifier."""

    def __init__(self, prompts: Sequence[Prompt], rollout: RolloutPool, verifier: RewardPool, seed: int) -> None:
        self.prompts, self.rollout, self.verifier, self.seed = prompts, rollout, verifier, seed

    async def evaluate(self, step: int) -> Evaluation:
        """Accuracy with the current weights. Raises RewardFailed if too many answers could not be judged."""
        requests = [
            GroupRequest(id=f"evaluation-{step}-{i}", prompt=prompt, samples=1, seed=self.seed, step=step)
            for i, prompt in enumerate(self.prompts)
        ]
        batches = [ref async for ref in self.rollout.generate(requests)]
        groups, report = await self.judge(batches)
        correct = correctness(groups)
        check_failures(report, self.verifier.config.max_failed_share, "the verifier of the held-out evaluation")
        samples = [group.samples[0] for group in groups]
        return Evaluation(
            accuracy=float(np.nanmean(correct)),
            metrics={
                "evaluation/samples": float(len(samples)),
                "evaluation/unjudged": float(np.isnan(correct).sum()),
                "evaluation/length_mean": float(np.mean([len(sample) for sample in samples])),
                "evaluation/truncated_share": float(np.mean([s.finish_reason == "length" for s in samples])),
            },
        )

    async def judge(self, batches: Sequence[Any]) -> tuple[list[Group], ScoreReport]:
        """Score groups (or references to lists of them) with the verifier."""
        scored = await self.verifier.score(batches)
        lists = await asyncio.gather(*(_fetch(ref) for ref in scored.batches))
        return [group for groups in lists for group in groups], scored.report


def correctness(groups: Sequence[Group]) -> np.ndarray:
    """[B] 1.0 right, 0.0 wrong, NaN not judged.

    The component `correct`, or the value of a verifier without it. Raises RewardFailed if there is neither.
    """
    return np.array([_correct(score) for group in groups for _, score in group.scored()])


def _correct(score: Score) -> float:
    if not score.valid:
        return float("nan")
    correct = score.components.get("correct", score.value)
    if correct is None:
        raise RewardFailed("the verifier gives no value for a whole response: verifier=NAME must be a reward that does")
    return correct


async def _fetch(ref: Any) -> list[Group]:
    groups: list[Group] = await ref
    return groups
