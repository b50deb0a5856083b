"""The sections of a combined reward's parts: a reward's own fields, and where and how much it counts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator

from rewards.base import Reward, RewardConfig
from rewards.combined.routing import When
from rewards.shaping.parse import Shaping
from rewards.shaping.steps import Step

TARGET = "_target_"
PART_NAME = re.compile(r"(?!(?:unshaped|ensemble_std)$)[A-Za-z][A-Za-z0-9_]*")
"""The two names left out are components of the combination itself."""
"""Names stand in keys (`reward.parts.NAME.weight`) and in metrics."""


class Placement(BaseModel):
    """What a combination says about any part."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    weight: float = Field(default=1.0, allow_inf_nan=False)
    """Factor of its value and of its process rewards, with combine=sum, logical_and or mean."""
    when: When = When()
    """The prompts that it judges; where it does not, it has no say. All conditions must hold."""

    @model_validator(mode="before")
    @classmethod
    def _without_target(cls, section: Any) -> Any:
        return {key: v for key, v in section.items() if key != TARGET} if isinstance(section, Mapping) else section


class PartOptions(Placement):
    """What a combination says about a part that is no combination itself."""

    shaping: Shaping = ()
    """Steps applied to its scores before they are combined."""


@dataclass(frozen=True)
class Part:
    """A part, ready to be made."""

    name: str
    target: str
    kind: type[Reward]
    config: RewardConfig
    """Its own options."""
    options: Placement
    """What the combination says about it."""

    @property
    def shaping(self) -> tuple[Step, ...]:
        """Steps between its scores and the combination."""
        return self.options.shaping if isinstance(self.options, PartOptions) else ()

    def section(self) -> dict[str, Any]:
        """Its section with every value filled in, as plain values."""
        return {TARGET: self.target, **self.options.model_dump(mode="json"), **self.config.model_dump(mode="json")}


def part_model(section: Mapping[str, Any]) -> type[BaseModel]:
    """The typed section of a part: the fields of its class and those of a part. Raises PartError."""
    kind, placement = _kind(section)
    own = kind.config_model({key: value for key, value in section.items() if key != TARGET})
    return create_model(f"{kind.__name__}Part", __base__=(placement, own))


def read_part(name: str, section: Any) -> Part:
    """A part from its section. Raises ValueError: PartError, pydantic's ValidationError, or a plain one."""
    if PART_NAME.fullmatch(name) is None:
        raise ValueError(
            f"{name!r} cannot name a part: letters, digits and _ only, a letter first; unshaped, ensemble_std are taken"
        )
    if not isinstance(section, Mapping):
        raise ValueError(f"{name}: must be a section with {TARGET}, not {section!r}")
    kind, placement = _kind(section)
    options = {key: value for key, value in section.items() if key in placement.model_fields}
    own = {key: value for key, value in section.items() if key not in options and key != TARGET}
    return Part(name, section[TARGET], kind, kind.Config(**own), placement(**options))


def _kind(section: Mapping[str, Any]) -> tuple[type[Reward], type[Placement]]:
    """The class of a part, and what a combination says about it; one with a `shaping` of its own is shaped by that."""
    from rlkit.config.parts import PartError, import_part

    kind: type[Reward] = import_part("reward", section.get(TARGET))
    placement = Placement if "shaping" in kind.Config.model_fields else PartOptions
    clash = sorted(placement.model_fields.keys() & kind.Config.model_fields.keys())
    if clash:
        raise PartError(f"cannot be a part: its Config has {' and '.join(clash)}, which every part has already")
    return kind, placement
