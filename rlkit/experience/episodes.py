"""What the episodes of a step or of an evaluation have in common."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from statistics import fmean

from rlkit.experience.types import Sample


def environment_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """Of the samples that are episodes; means over those whose environment did not break."""
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
    turns = [[span for span in sample.spans if span.role == "assistant"] for sample, _ in whole]
    metrics["environment/turns"] = fmean(len(own) for own in turns)
    metrics["environment/observation_tokens"] = fmean(len(sample) - sample.length for sample, _ in whole)
    metrics["environment/malformed_share"] = fmean(bool(turn.data.get("malformed")) for own in turns for turn in own)
    metrics["environment/budget_share"] = fmean(episode.ended in ("turns", "tokens") for _, episode in whole)
    if any(episode.success is not None for _, episode in whole):
        metrics["environment/success"] = fmean(bool(episode.success) for _, episode in whole)
    of_its_own: defaultdict[str, list[float]] = defaultdict(list)
    for _, episode in whole:
        for name, value in episode.metrics.items():
            of_its_own[name].append(value)
    return metrics | {f"environment/metric/{name}": fmean(values) for name, values in of_its_own.items()}
