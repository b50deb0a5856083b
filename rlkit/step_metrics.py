"""Metrics of a step's groups that every algorithm shares, and the summary of a whole run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlkit.evaluation import correctness
from rlkit.experience import Group
from rlkit.experience.buffer import BufferStats
from rlkit.serving.results import ScoreReport


def rollout_metrics(
    groups: Sequence[Group], report: ScoreReport, judged: Sequence[Group] | None, stats: BufferStats, seconds: float
) -> dict[str, float]:
    """Rewards, lengths, group spread, failures, buffer; `seconds` is how long the sampler worked for them."""
    values: list[list[float]] = []
    components: defaultdict[str, list[float]] = defaultdict(list)
    for group in groups:
        scores = [score for _, score in group.scored() if score.valid]
        values.append([score.value for score in scores if score.value is not None])
        for score in scores:
            for name, part in score.components.items():
                components[name].append(part)
    rewards = np.array([value for group in values for value in group])
    samples = [sample for group in groups for sample in group.samples]
    lengths = np.array([len(sample) for sample in samples])
    metrics = {
        "reward/failed": float(report.failed),
        "length/mean": float(lengths.mean()),
        "length/max": float(lengths.max()),
        "length/truncated_share": float(np.mean([sample.finish_reason == "length" for sample in samples])),
        "time/reward_busy": report.seconds,
        "buffer/ready": float(stats.ready),
        "buffer/in_flight": float(stats.in_flight),
        "buffer/dropped_stale": float(stats.dropped_stale),
        "buffer/rejected": float(sum(stats.rejected.values())),
    }
    compared = [group for group in values if len(group) > 1]
    if compared:
        metrics["group/all_equal_share"] = float(np.mean([np.ptp(group) == 0 for group in compared]))
    if seconds > 0:
        metrics["tokens/per_second"] = float(lengths.sum() / seconds)
    if len(rewards):
        metrics |= {"reward/mean": float(rewards.mean()), "reward/std": float(rewards.std())}
    for reason, count in report.failures.items():
        metrics[f"reward/failed/{reason}"] = float(count)
    for name, parts in components.items():
        metrics[f"reward/component/{name}"] = float(np.mean(parts))
    if judged is not None:
        correct = correctness(judged)
        if not np.isnan(correct).all():
            metrics["accuracy/train"] = float(np.nanmean(correct))
    return metrics


def summary(
    *,
    steps: int,
    accuracies: Mapping[int, float],
    wall_seconds: float,
    seconds_per_step: float,
    reward_failed: int,
    policy: Path,
) -> dict[str, Any]:
    """What summary.json holds. `accuracies`: step -> held-out accuracy; empty if the data has no held-out answers."""
    return {
        "accuracy_before": accuracies.get(0),
        "accuracy_after": accuracies.get(steps),
        "steps": steps,
        "wall_seconds": round(wall_seconds, 3),
        "seconds_per_step": round(seconds_per_step, 4),
        "reward_failed": reward_failed,
        "accuracy_by_step": {str(step): accuracy for step, accuracy in accuracies.items()},
        "policy": str(policy),
    }
