"""Checks that process rewards and steps have a source and are used."""

from __future__ import annotations

from algorithms.base import Algorithm
from rlkit.config.messages import ConfigIssue, Issues
from rlkit.config.parts import Part
from rlkit.config.schema import RolloutConfig
from rlkit.experience.filters import BufferConfig


def process_rewards_come_from_somewhere(algorithm: Algorithm, reward: Part) -> Issues:
    """PRIME without a process reward model would stop after the first rollout."""
    if algorithm.needs().process_rewards and not reward.cls.traits(reward.config).process_rewards:
        yield ConfigIssue(
            "reward",
            f"{type(algorithm).__name__} needs process rewards, but {reward.cls.__name__} gives none; "
            "use reward=implicit_prm, or your own function with reward.per_step=true",
        )


def rewards_are_read(algorithm: Algorithm, reward: Part) -> Issues:
    traits, needs = reward.cls.traits(reward.config), algorithm.needs()
    if not needs.rewards:
        return
    if traits.process_rewards and not (traits.process_in_value or needs.process_rewards or needs.reads_process_rewards):
        yield ConfigIssue(
            "reward",
            f"{reward.cls.__name__} gives process rewards, which {type(algorithm).__name__} would ignore; choose "
            "another reward, or an algorithm that learns from them: ppo, prime, pure, grpo_process, rloo_process, "
            "episode_plus_step, turn_discounted, turn_grpo, gigpo "
            "(rloo_process algorithm.process_coefficient=0 is RLOO on outcomes)",
        )
    if needs.outcome_rewards and not traits.outcome_rewards:
        yield ConfigIssue(
            "reward",
            f"{reward.cls.__name__} gives only process rewards, but {type(algorithm).__name__} needs outcomes, too: "
            "use 'reward=[math,NAME]', or algorithm=grpo_process, which needs none",
        )


def process_rewards_count_once(algorithm: Algorithm, reward: Part) -> Issues:
    traits = reward.cls.traits(reward.config)
    if algorithm.needs().reads_process_rewards and traits.process_rewards and traits.process_in_value:
        yield ConfigIssue(
            "reward",
            f"{type(algorithm).__name__} adds values and process rewards, but the value of {reward.cls.__name__} "
            "already contains these, so they count twice; with reward=environment, reward.value=none counts them once",
            warning=True,
        )


def steps_are_split_for_somebody(rollout: RolloutConfig, reward: Part) -> Issues:
    traits = reward.cls.traits(reward.config)
    if rollout.source == "data" and (traits.steps or rollout.steps != "none"):
        yield ConfigIssue("rollout.steps", "recorded responses (rollout.source=data) are not split into steps")
    elif traits.steps and rollout.steps == "none":
        yield ConfigIssue(
            "rollout.steps", f"{reward.cls.__name__} judges steps; say what a step is, for example rollout.steps=lines"
        )
    elif rollout.steps != "none" and not (traits.steps or traits.process_rewards):
        yield ConfigIssue(
            "rollout.steps", f"has no effect: {reward.cls.__name__} gives no process rewards; leave it out"
        )


def filters_see_outcomes(buffer: BufferConfig, reward: Part) -> Issues:
    if reward.cls.traits(reward.config).outcome_rewards:
        return
    for name in ("drop_equal_rewards", "min_group_reward", "max_group_reward"):
        if (value := getattr(buffer, name)) is not None and value is not False:  # 0.0 is a bound
            yield ConfigIssue(f"buffer.{name}", f"has no effect: {reward.cls.__name__} gives only process rewards")


PROCESS_REWARDS = (
    process_rewards_come_from_somewhere,
    rewards_are_read,
    process_rewards_count_once,
    steps_are_split_for_somebody,
    filters_see_outcomes,
)
