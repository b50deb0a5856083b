"""The step metrics that all algorithms share, the run's summary, and the guard against failing updates."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from rlkit.config.schema import TrainerConfig
from rlkit.experience import Group, UserError
from rlkit.experience.buffer import BufferStats
from rlkit.experience.episodes import environment_metrics
from rlkit.experience.scores import ScoreReport, verdicts


def rollout_metrics(
    groups: Sequence[Group],
    rejected: Sequence[Group],
    report: ScoreReport,
    judged: Sequence[Group] | None,
    stats: BufferStats,
    seconds: float,
) -> dict[str, float]:
    """Return rewards, lengths and spread of all scored groups, trained or rejected by a filter; failures; buffer.

    `judged`: the same groups as scored by the verifier. `seconds`: the sampler's working time for them.
    """
    values: list[list[float]] = []
    components: defaultdict[str, list[float]] = defaultdict(list)
    for group in (*groups, *rejected):
        scores = [score for _, score in group.scored() if score.valid]
        values.append([score.value for score in scores if score.value is not None])
        for score in scores:
            for name, part in score.components.items():
                components[name].append(part)
    rewards = np.array([value for group in values for value in group])
    samples = [sample for group in (*groups, *rejected) for sample in group.samples]
    lengths = np.array([sample.length for sample in samples])
    metrics = {
        "reward/failed": float(report.failed),
        "length/mean": float(lengths.mean()),
        "length/max": float(lengths.max()),
        "length/truncated_share": float(np.mean([sample.finish_reason == "length" for sample in samples])),
        "time/reward_busy": report.seconds,
        "buffer/ready": float(stats.ready),
        "buffer/in_flight": float(stats.in_flight),
        "buffer/rejected": float(sum(stats.rejected.values())),
    }
    if stats.surplus:
        metrics["buffer/surplus"] = float(stats.surplus)
    compared = [group for group in values if len(group) > 1]
    if compared:
        metrics["group/all_equal_share"] = float(np.mean([np.ptp(group) == 0 for group in compared]))
    if seconds > 0 and any(sample.logprobs is not None for sample in samples):
        metrics["tokens/per_second"] = float(lengths.sum() / seconds)
    metrics |= staleness_metrics(groups) | environment_metrics(samples)
    # Labels of recorded responses, which no reward judged, say nothing about the policy.
    if len(rewards) and (report.samples or any(sample.logprobs is not None for sample in samples)):
        metrics |= {"reward/mean": float(rewards.mean()), "reward/std": float(rewards.std())}
    trained = [value for group in values[: len(groups)] for value in group]
    if trained and stats.rejected:
        metrics["reward/mean_trained"] = fmean(trained)
    for kind in ("all_right", "all_wrong"):
        if stats.rejected:
            metrics[f"buffer/rejected_{kind}"] = float(stats.verdicts.get(kind, 0))
    for reason, count in report.failures.items():
        metrics[f"reward/failed/{reason}"] = float(count)
    for name, parts in components.items():
        metrics[f"reward/component/{name}"] = float(np.mean(parts))
    if judged is not None:
        area, own = verdicts(judged)
        verdict = np.concatenate(own)
        if not np.isnan(verdict).all():
            metrics[f"{area}/train"] = float(np.nanmean(verdict))
    return metrics


def staleness_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Return how many updates ago the weights of the trained tokens were published; nothing if all were fresh."""
    ages: list[np.ndarray] = []
    mixed: list[bool] = []
    for group in groups:
        for sample in group.samples:
            if sample.logprobs is None:
                continue
            versions = np.full(len(sample), sample.policy_versions[0]) if sample.versions is None else sample.versions
            ages.append(group.step - 1 - versions[sample.trained])
            mixed.append(sample.policy_versions[0] < sample.policy_versions[1])
    joined = np.concatenate(ages) if ages else np.zeros(0)
    if not joined.any():
        return {}
    return {
        "staleness/mean": float(joined.mean()),
        "staleness/max": float(joined.max()),
        "staleness/mixed_share": fmean(mixed),
    }


def summary(
    *,
    steps: int,
    headline: str,
    heldout: Mapping[int, float],
    wall_seconds: float,
    seconds_per_step: float,
    reward_failed: int,
    policy: str | None,
    best: Mapping[str, Any] | None = None,
    ended: str | None = None,
    diagnosed: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the content of summary.json. `heldout`: step -> the evaluation's `headline`; empty without evaluations.

    `best`: metric, value, step and policy of the best evaluation. `ended`: why the run ended before its last step, if
    it did. `diagnosed`: entries of diagnostics.
    """
    area = headline.partition("/")[0]  # accuracy_before, reward_before, ...
    return {
        "headline": headline,
        f"{area}_before": heldout.get(0),
        f"{area}_after": heldout.get(steps),
        "steps": steps,
        "wall_seconds": round(wall_seconds, 3),
        "seconds_per_step": round(seconds_per_step, 4),
        "reward_failed": reward_failed,
        f"{area}_by_step": {str(step): value for step, value in heldout.items()},
        "policy": policy,
        "best": best,
        "ended": ended,
        **(diagnosed or {}),
    }


class TrainingFailedError(UserError): ...


MISMATCHED_STEPS = 3
"""A single step may be an outlier: few trained tokens, or one response of a policy near collapse. Three in a row are no
accident, and three updates on wrong log-probs, clipped and at a usual learning rate, do little harm."""


class UpdateGuard:
    def __init__(self, config: TrainerConfig, warn: Callable[[str], None]) -> None:
        self.config, self.warn = config, warn
        self.skipped_in_a_row = 0
        self.mismatched_in_a_row = 0

    def check(self, metrics: Mapping[str, float]) -> None:
        """Warn, or raise TrainingFailedError after `trainer.max_skipped_updates` skipped updates in a row, or
        `MISMATCHED_STEPS` steps in a row above `trainer.max_mismatch`."""
        mismatch = metrics.get("mismatch/logprob_mean", 0.0)
        self._limit(mismatch)
        if not mismatch <= self.config.mismatch_alarm:  # also true for NaN
            self.warn(
                f"sampler and learner disagree by {mismatch:.3g} in log-prob on average, more than "
                f"trainer.mismatch_alarm={self.config.mismatch_alarm:g}. Causes: different precision or kernels, "
                "sampling from a truncated or penalised distribution (rollout.top_p and the like), or stale weights"
            )
        if not metrics["policy/trained_samples"] and not metrics.get("policy/waits"):
            self.warn("a step had nothing to train on: no group had two valid samples")
        skipped = [name for name in ("policy", "critic") if metrics.get(f"{name}/skipped_updates")]
        if not skipped:
            self.skipped_in_a_row = 0
            return
        self.skipped_in_a_row += 1
        self.warn(f"an update of the {' and of the '.join(skipped)} was skipped: its loss or gradient was not finite")
        if self.skipped_in_a_row >= self.config.max_skipped_updates:
            raise TrainingFailedError(
                f"{self.skipped_in_a_row} updates in a row had a non-finite loss or gradient, most recently of the "
                f"{' and of the '.join(skipped)} (trainer.max_skipped_updates): lower learner.learning_rate (or "
                "critic.learning_rate), or look at the rewards in samples.jsonl"
            )

    def state_dict(self) -> dict[str, int]:
        return {"skipped_updates": self.skipped_in_a_row, "mismatched_updates": self.mismatched_in_a_row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.skipped_in_a_row = state["skipped_updates"]
        self.mismatched_in_a_row = state.get("mismatched_updates", 0)  # not in older checkpoints

    def _limit(self, mismatch: float) -> None:
        limit = self.config.max_mismatch
        # With stale samples the difference also reflects their age, which the loss's weights correct.
        if limit is None or self.config.max_staleness or mismatch <= limit:
            self.mismatched_in_a_row = 0
            return
        self.mismatched_in_a_row += 1  # also for NaN
        if self.mismatched_in_a_row >= MISMATCHED_STEPS:
            raise TrainingFailedError(
                f"for {MISMATCHED_STEPS} steps in a row the sampler's log-probs have differed from the learner's by "
                f"more than trainer.max_mismatch={limit:g} on average (now {mismatch:.3g}): the policy being trained "
                "is not the one that samples. Causes: a model that sampler and learner compute differently, old "
                "weights, a collapsed policy, or rollout.top_p, top_k, min_p, repetition_penalty or structured, which "
                "change the sampled distribution; null turns this limit off"
            )
