"""A reward by `_target_`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rewards.base import Reward, RewardConfig


def load_part(section: Mapping[str, Any]) -> tuple[type[Reward], RewardConfig]:
    """Class and options of a section with `_target_`. Raise PartError or pydantic's ValidationError."""
    from rlkit.config.parts import import_part

    kind: type[Reward] = import_part("reward", section.get("_target_"))
    return kind, kind.Config(**{key: value for key, value in section.items() if key != "_target_"})
