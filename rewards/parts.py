"""A reward by `_target_`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from rewards.base import Reward, RewardConfig


def load_part(section: Mapping[str, Any]) -> tuple[type[Reward], RewardConfig]:
    """Class and options of a section with `_target_`. Raise PartError or pydantic's ValidationError."""
    from rlkit.config.parts import import_part

    kind: type[Reward] = import_part("reward", section.get("_target_"))
    return kind, kind.Config(**{key: value for key, value in section.items() if key != "_target_"})


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
