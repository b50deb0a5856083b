"""Metrics of a step's groups that every algorithm shares."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

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
        "group/all_equal_share": float(np.mean([len(group) > 0 and np.ptp(group) == 0 for group in values])),
        "tokens/per_second": float(lengths.sum() / seconds) if seconds > 0 else 0.0,
        "time/reward_busy": report.seconds,
        "buffer/ready": float(stats.ready),
        "buffer/in_flight": float(stats.in_flight),
        "buffer/dropped_stale": float(stats.dropped_stale),
        "buffer/rejected": float(sum(stats.rejected.values())),
    }
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
