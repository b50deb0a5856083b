"""A reward named by a configuration section: for rewards that are made of other rewards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rewards.base import Reward, RewardConfig


def load_part(section: Mapping[str, Any]) -> tuple[type[Reward], RewardConfig]:
    """Class and options of `_target_` and the fields beside it. Raises PartError or pydantic's ValidationError."""
    from rlkit.config.parts import import_part

    kind: type[Reward] = import_part("reward", section.get("_target_"))
    return kind, kind.Config(**{key: value for key, value in section.items() if key != "_target_"})
