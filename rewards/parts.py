"""Rewards that others build on, by their `_target_`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from rewards.base import Reward, RewardConfig, RewardTraits


def load_part(section: Mapping[str, Any]) -> tuple[type[Reward], RewardConfig]:
    """Class and options of a section with `_target_`. Raise PartError or pydantic's ValidationError."""
    from rlkit.config.parts import import_part

    kind: type[Reward] = import_part("reward", section.get("_target_"))
    return kind, kind.Config(**{key: value for key, value in section.items() if key != "_target_"})


def with_outcome(own: RewardTraits, section: Mapping[str, Any]) -> RewardTraits:
    """Traits of a reward that learns from the values of another one (`reward.outcome`): it needs what that one does."""
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
        outcome_rewards=own.outcome_rewards and outcome.outcome_rewards,
    )


def outcome_problems(section: Mapping[str, Any]) -> list[str]:
    """What is wrong with `reward.outcome`, the reward whose values another one learns from."""
    from rlkit.config.parts import PartError

    try:
        kind, options = load_part(section)
    except PartError as error:
        return [f"reward.outcome._target_: {error}"]
    except ValidationError as error:
        return [f"reward.outcome.{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
    messages = [f"reward.outcome: {message}" for message in kind.check(options)]
    if kind.traits(options).process_rewards:
        messages.append(
            f"reward.outcome: the process rewards of {kind.__name__} would be lost; combine both rewards: "
            "'reward=[NAME,NAME]'"
        )
    return messages
