"""Rewards that other rewards build on, loaded by their `_target_`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pydantic import ValidationError, model_validator

from rewards.base import Reward, RewardConfig, RewardTraits
from rlkit.experience.section import Deadline


def load_part(section: Mapping[str, Any]) -> tuple[type[Reward], RewardConfig]:
    """Return class and options of a section with `_target_`. Raise PartError or pydantic's ValidationError."""
    from rlkit.config.parts import import_part

    kind: type[Reward] = import_part("reward", section.get("_target_"))
    return kind, kind.Config(**{key: value for key, value in section.items() if key != "_target_"})


class OutcomeConfig(RewardConfig):
    """Fields of a reward that learns from another reward's values. A subclass names that one in its field `outcome`."""

    timeout_seconds: Deadline = 120.0
    """Deadline of one scoring call; by default 120 s plus the outcome's own deadline. When it passes, the worker is
    replaced and the call retried once."""

    @model_validator(mode="before")
    @classmethod
    def _time_for_the_outcome(cls, section: Any) -> Any:
        if not isinstance(section, Mapping) or "timeout_seconds" in section:
            return section
        outcome = section.get("outcome", cls.model_fields["outcome"].default)
        if not isinstance(outcome, Mapping):
            return section
        try:
            _, options = load_part(outcome)
        except (ValueError, TypeError):  # `check` says what is wrong with it
            return section
        own = cls.model_fields["timeout_seconds"].default
        return {**section, "timeout_seconds": own + options.timeout_seconds}


def with_outcome(own: RewardTraits, section: Mapping[str, Any]) -> RewardTraits:
    """Return the traits of a reward that learns from `reward.outcome`, including whatever that outcome needs."""
    try:
        kind, options = load_part(section)
    except ValueError:  # `check` says what is wrong with it
        return own
    outcome = kind.traits(options)
    return replace(
        own,
        references=outcome.references,
        answer=outcome.answer,
        columns=outcome.columns,
        samples=outcome.samples,
        environment=own.environment or outcome.environment,
        steps=own.steps or outcome.steps,
        outcome_rewards=own.outcome_rewards and outcome.outcome_rewards,
        raw_scores=own.outcome_rewards and outcome.raw_scores,
    )


def outcome_problems(section: Mapping[str, Any], timeout_seconds: float) -> list[str]:
    """Return what is wrong with `reward.outcome`; the reward that learns from its values has this deadline."""
    from rlkit.config.parts import PartError

    try:
        kind, options = load_part(section)
    except PartError as error:
        return [f"reward.outcome._target_: {error}"]
    except ValidationError as error:
        return [f"reward.outcome.{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
    messages = [f"reward.outcome: {message}" for message in kind.check(options)]
    for name in ("workers", "max_failed_share"):
        if (value := getattr(options, name)) != type(options).model_fields[name].default:
            messages.append(f"reward.outcome.{name}={value}: has no effect in an outcome; set reward.{name}")
    if options.timeout_seconds >= timeout_seconds:
        messages.append(
            f"reward.timeout_seconds={timeout_seconds:g}: the outcome is judged first and may take "
            f"{options.timeout_seconds:g} s, which leaves nothing for the rest; set more than that, or lower "
            "reward.outcome.timeout_seconds"
        )
    traits = kind.traits(options)
    if traits.update_when != "none" or traits.follows_policy:
        messages.append(
            f"reward.outcome: {kind.__name__} learns, keeps running statistics or follows the policy, but nothing "
            "updates an outcome; name a reward that does not change, or combine both rewards: 'reward=[NAME,NAME]'"
        )
    if traits.process_rewards:
        messages.append(
            f"reward.outcome: the process rewards of {kind.__name__} would be lost; combine both rewards: "
            "'reward=[NAME,NAME]'"
        )
    return messages
