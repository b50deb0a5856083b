"""The section `tracking`: what a run writes and shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from rlkit.config.named import parse_trackers
from rlkit.experience.section import Section
from rlkit.trackers.base import TrackerConfig

TENSORBOARD = "tensorboard"


class TrackingConfig(Section):
    """What a run writes and shows."""

    console: Literal["auto", "live", "plain", "off"] = "auto"
    """live: a view that redraws itself; plain: one line per step; auto: live on a terminal, else plain."""
    trackers: Annotated[tuple[SerializeAsAny[TrackerConfig], ...], BeforeValidator(parse_trackers)] = Field(
        default=(TENSORBOARD,), validate_default=True
    )
    """Trackers that get metrics, texts and warnings in addition to the run folder: names (tensorboard, wandb, mlflow,
    trackio, swanlab), dotted paths of your classes, or mappings with a `kind` and its options. [] turns all off."""
    sample_groups_per_step: int | None = Field(default=16, ge=0)
    """Groups per step whose responses go to samples.jsonl, and as many of the groups that filters reject; null: all."""
    keep_samples: Literal["all", "best_worst"] = "all"
    """Which responses of these groups to keep: all, or the best and the worst of each group."""
    token_groups_per_step: int = Field(default=4, ge=0)
    """For how many of these groups to write per-token signals to `tokens/`: those with the widest and the narrowest
    spread of rewards, and others at random. 0: none."""
    token_gib: float = Field(default=1.0, gt=0)
    """When `tokens/` grows above this size, every second file of its older half is removed."""

    @model_validator(mode="before")
    @classmethod
    def _of_an_older_file(cls, fields: Any) -> Any:
        """In older files, `tensorboard: true|false` was the only choice of tracker."""
        if not isinstance(fields, Mapping) or TENSORBOARD not in fields:
            return fields
        others = {name: value for name, value in fields.items() if name != TENSORBOARD}
        if fields[TENSORBOARD] not in (True, False):
            raise ValueError(f"tensorboard={fields[TENSORBOARD]} must be true or false; better, use trackers=[...]")
        return others if fields[TENSORBOARD] else {"trackers": (), **others}

    @model_validator(mode="after")
    def _every_option_acts(self) -> Self:
        if self.token_groups_per_step == 0 and self.token_gib != type(self).model_fields["token_gib"].default:
            raise ValueError("token_gib has no effect with token_groups_per_step=0")
        if self.sample_groups_per_step == 0 and self.keep_samples != "all":
            raise ValueError("keep_samples has no effect with sample_groups_per_step=0")
        return self
