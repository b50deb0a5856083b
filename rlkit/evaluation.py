"""Held-out evaluation: responses to held-out prompts, judged by the run's verifier, never trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rlkit.config.schema import EvaluationConfig
from rlkit.experience import Group, Prompt
from rlkit.experience.episodes import environment_metrics, share_bounds
from rlkit.experience.scores import Area, check_failures, verdicts, with_scores
from rlkit.experience.statistics import best_sizes, expected_best, mean_of_questions
from rlkit.experience.types import FloatArray
from rlkit.rollout.pool import RolloutPool
from rlkit.rollout.requests import GroupRequest
from rlkit.serving.pool import RewardPool
from rlkit.serving.stored import Stored, groups_in


@dataclass(frozen=True)
class Evaluation:
    headline: str
    """The metric that summarises the evaluation (larger is better): `accuracy/heldout` (a share), `reward/heldout`, or
    another `AREA/heldout`."""
    metrics: Mapping[str, float]
    """All metrics, including the headline."""

    @property
    def value(self) -> float:
        return self.metrics[self.headline]


class Evaluator:
    """Samples with the rollout workers and scores with the verifier."""

    def __init__(
        self,
        sets: Mapping[str, Sequence[Prompt]],
        rollout: RolloutPool,
        verifier: RewardPool,
        config: EvaluationConfig,
        seed: int,
        training_judged: bool = False,
    ) -> None:
        """`sets`: name (`OWN` first, if present) -> prompts, none of them empty. `training_judged`: the verifier is the
        run's reward, so training groups already have its scores."""
        self.sets, self.rollout, self.verifier, self.config, self.seed = sets, rollout, verifier, config, seed
        self.training_judged = training_judged

    async def evaluate(self, step: int) -> Evaluation:
        """Evaluate the current weights. Raises RewardFailed if too many answers could not be judged."""
        requests = {name: self._requests(name, prompts, step) for name, prompts in self.sets.items()}
        batches = [ref async for ref in self.rollout.generate([one for some in requests.values() for one in some])]
        scored = await self.verifier.score(batches)
        groups = with_scores([group for batch in batches for group in await groups_in(batch)], scored.scores)
        area, values = verdicts(groups)
        check_failures(scored.report, self.verifier.config.max_failed_share, "the verifier of the held-out evaluation")
        judged = {group.id: (group, own) for group, own in zip(groups, values, strict=True)}
        metrics: dict[str, float] = {}
        for name, asked in requests.items():
            metrics |= _measures(name, area, [judged[request.id] for request in asked])
        return Evaluation(_headline(next(iter(self.sets)), area), metrics)

    def _requests(self, name: str, prompts: Sequence[Prompt], step: int) -> list[GroupRequest]:
        start = f"evaluation-{step}-{name}-" if name else f"evaluation-{step}-"
        return [
            GroupRequest(
                id=f"{start}{i}",
                prompt=prompt,
                samples=self.config.samples,
                seed=self.seed,
                step=step,
                temperature=0.0 if self.config.greedy else self.config.temperature,
                max_response_tokens=self.config.max_response_tokens,
            )
            for i, prompt in enumerate(prompts)
        ]

    async def judge_training(self, groups: list[Group], stored: Stored) -> list[Group] | None:
        """Return a step's groups as scored by the verifier; None unless `evaluation.training_answers` is set."""
        if not self.config.training_answers:
            return None
        if self.training_judged:
            return groups
        scored = await self.verifier.score(stored.references(groups), [group.id for group in groups])
        return with_scores(groups, scored.scores)


def _measures(name: str, area: Area, judged: Sequence[tuple[Group, FloatArray]]) -> dict[str, float]:
    """Return the metrics of one set, given as pairs of a group and its verdicts."""
    unjudged = sum(int(np.isnan(own).sum()) for _, own in judged)
    means = [float(np.nanmean(own)) for _, own in judged if not np.isnan(own).all()]
    estimate = mean_of_questions(means, share=area == "accuracy")
    samples = [sample for group, _ in judged for sample in group.samples]
    of_episodes = environment_metrics(samples) | share_bounds(samples)
    prefix = f"evaluation/{name}/" if name else "evaluation/"
    metrics = {
        _headline(name, area): estimate.value,
        f"{prefix}samples": float(len(samples)),
        f"{prefix}unjudged": float(unjudged),
        f"{prefix}length_mean": float(np.mean([sample.length for sample in samples])),
        f"{prefix}truncated_share": float(np.mean([sample.finish_reason == "length" for sample in samples])),
        **{f"{prefix}{metric}": value for metric, value in of_episodes.items()},
    }
    if estimate.questions > 1:
        metrics |= {f"{_headline(name, area)}/low": estimate.low, f"{_headline(name, area)}/high": estimate.high}
    best = "pass" if area == "accuracy" else "best"
    for k in best_sizes(len(judged[0][1])):
        full = [own[~np.isnan(own)] for _, own in judged]
        estimates = [expected_best(own, k) for own in full if len(own) >= k]
        if estimates:
            metrics[f"{prefix}{best}@{k}"] = float(np.mean(estimates))
    return metrics


def _headline(name: str, area: Area) -> str:
    return f"evaluation/{name}/{area}" if name else f"{area}/heldout"
