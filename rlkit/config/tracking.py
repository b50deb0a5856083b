"""The section `tracking`: what a run writes and shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from rlkit.config.named import parse_trackers
from rlkit.experience.section import Section
from rlkit.trackers.base import TrackerConfig

TENSORBOARD = "tensorboard"


class TrackingConfig(Section):
    """What a run writes and shows."""

    console: Literal["auto", "live", "plain", "off"] = "auto"
    """live: a view that redraws itself; plain: a line per step; auto: live on a terminal, else plain."""
    trackers: Annotated[tuple[SerializeAsAny[TrackerConfig], ...], BeforeValidator(parse_trackers)] = Field(
        default=(TENSORBOARD,), validate_default=True
    )
    """Where numbers, texts and warnings go besides the run folder: names (tensorboard, wandb, mlflow, trackio,
    swanlab), dotted paths of your classes, or mappings with a `kind` and its options. [] turns all off."""
    sample_groups_per_step: int | None = Field(default=16, ge=0)
    """Groups per step whose responses go to samples.jsonl, and as many of those that filters reject; null: every group.
    """
    keep_samples: Literal["all", "best_worst"] = "all"
    """Which responses of these groups: all, or the best and the worst of each."""

    @model_validator(mode="before")
    @classmethod
    def _of_an_older_file(cls, fields: Any) -> Any:
        """`tensorboard: true|false` was the only choice of a tracker."""
        if not isinstance(fields, Mapping) or TENSORBOARD not in fields:
            return fields
        others = {name: value for name, value in fields.items() if name != TENSORBOARD}
        if fields[TENSORBOARD] not in (True, False):
            raise ValueError(f"tensorboard={fields[TENSORBOARD]} must be true or false; better is trackers=[...]")
        return others if fields[TENSORBOARD] else {"trackers": (), **others}
