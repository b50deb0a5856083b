"""Metrics over the episodes of a step or of an evaluation."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from statistics import fmean

from rlkit.experience.statistics import wilson
from rlkit.experience.types import Sample


def environment_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """Return metrics of the samples that are episodes; means leave out those whose environment broke."""
    episodes = [(sample, sample.episode) for sample in samples if sample.episode is not None]
    if not episodes:
        return {}
    broken = Counter(episode.failure.partition(":")[0] for _, episode in episodes if episode.ended == "failed")
    metrics = {f"environment/failed/{kind}": float(count) for kind, count in broken.items()}
    seconds = sum(episode.seconds for _, episode in episodes)
    if seconds > 0:
        metrics["environment/wait_share"] = sum(episode.waited for _, episode in episodes) / seconds
    whole = [(sample, episode) for sample, episode in episodes if episode.ended != "failed"]
    if not whole:
        return metrics
    turns = [sample.turns for sample, _ in whole]
    metrics["environment/turns"] = fmean(len(own) for own in turns)
    metrics["environment/observation_tokens"] = fmean(len(sample) - sample.length for sample, _ in whole)
    if any(sample.segments for sample, _ in whole):
        metrics["environment/segments"] = fmean(max(1, len(sample.segments)) for sample, _ in whole)
    metrics["environment/malformed_share"] = fmean(bool(turn.data.get("malformed")) for own in turns for turn in own)
    metrics["environment/budget_share"] = fmean(episode.ended in ("turns", "tokens") for _, episode in whole)
    if any(episode.success is not None for _, episode in whole):
        metrics["environment/success"] = fmean(bool(episode.success) for _, episode in whole)
    return metrics | {f"environment/metric/{name}": fmean(values) for name, values in _of_their_own(samples).items()}


def share_bounds(samples: Sequence[Sample]) -> dict[str, float]:
    """Return bounds of the share for those environment metrics that are 0 or 1 in every episode."""
    bounds: dict[str, float] = {}
    for name, values in _of_their_own(samples).items():
        if set(values) <= {0.0, 1.0}:
            low, high = wilson(sum(values), len(values))
            bounds |= {f"environment/metric/{name}_low": low, f"environment/metric/{name}_high": high}
    return bounds


def _of_their_own(samples: Sequence[Sample]) -> dict[str, list[float]]:
    values: defaultdict[str, list[float]] = defaultdict(list)
    for sample in samples:
        if sample.episode is not None and sample.episode.ended != "failed":
            for name, value in sample.episode.metrics.items():
                values[name].append(value)
    return values
