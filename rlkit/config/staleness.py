"""Checks of training on samples of older policies: what it needs, and where it does not help."""

from __future__ import annotations

from algorithms.base import Algorithm
from rlkit.config.messages import ConfigIssue, Issues
from rlkit.config.parts import Part
from rlkit.config.schema import ClusterConfig, RolloutConfig, TrainerConfig


def stale_samples_are_corrected(
    algorithm: Algorithm, trainer: TrainerConfig, rollout: RolloutConfig, cluster: ClusterConfig
) -> Issues:
    """Old log-probs are those of the learner's policy at the start of the step, so clipping alone sees no staleness."""
    key, corrects = "trainer.max_staleness", getattr(algorithm.config, "corrects", False)
    if corrects and rollout.reshaping:
        options = ", ".join(f"rollout.{name}" for name in rollout.reshaping)
        yield ConfigIssue(
            "algorithm.rollout_correction",
            f"also multiplies every token by the change that {options} made to its probability (the sampler's "
            "log-probs are of the tokens that are left, the learner's of all); it is better to sample from all tokens",
            warning=True,
        )
    if not trainer.max_staleness:
        return
    if not algorithm.needs().corrects_staleness:
        yield ConfigIssue(
            key,
            f"trains on samples of older policies, but the loss of {type(algorithm).__name__} cannot weight them "
            "(needs().corrects_staleness); set 0",
        )
    elif not corrects and hasattr(algorithm.config, "corrects"):
        yield ConfigIssue(
            key,
            "trains on samples of older policies as if they were the current one's, because "
            "algorithm.rollout_correction=none; leave that out to get truncated importance weights",
            warning=True,
        )
    if cluster.device == "cuda" and cluster.placement == "colocated":
        yield ConfigIssue(
            key,
            "makes sampler and learner work at once on the GPUs that they share, and neither frees memory for the "
            "other; 0 lets them take turns, cluster.placement=apart gives each its own GPUs",
            warning=True,
        )


def kept_caches_act(trainer: TrainerConfig, rollout: RolloutConfig) -> Issues:
    if rollout.cache_after_update == "recompute":
        return
    idle = "trainer.max_staleness=0" if not trainer.max_staleness else f"rollout.source={rollout.source}"
    if not trainer.max_staleness or rollout.source != "policy":
        yield ConfigIssue(
            "rollout.cache_after_update", f"has no effect with {idle}: nothing is being sampled when weights arrive"
        )


def parked_episodes_act(trainer: TrainerConfig, environment: Part | None) -> Issues:
    if environment is not None and environment.config.new_weights == "park" and not trainer.max_staleness:
        yield ConfigIssue(
            "environment.new_weights",
            "park has no effect with trainer.max_staleness=0: no episode is open when weights arrive",
        )


STALENESS = (stale_samples_are_corrected, kept_caches_act, parked_episodes_act)
