"""The section `tracking`: what a run writes and shows."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from rlkit.experience.section import Section


class TrackingConfig(Section):
    """What a run writes and shows."""

    console: Literal["auto", "live", "plain", "off"] = "auto"
    """live: a view that redraws itself; plain: a line per step; auto: live on a terminal, else plain."""
    tensorboard: bool = True
    """Write `tensorboard/` in the run folder."""
    sample_groups_per_step: int | None = Field(default=16, ge=0)
    """Groups per step whose responses go to samples.jsonl, and as many of those that filters reject; null: every group.
    """
    keep_samples: Literal["all", "best_worst"] = "all"
    """Which responses of these groups: all, or the best and the worst of each."""
    token_groups_per_step: int = Field(default=4, ge=0)
    """Of these groups, how many leave the signals of each token in `tokens/`: the widest and the narrowest spread of
    rewards, and others at random. 0: none."""
    token_gib: float = Field(default=1.0, gt=0)
    """Size of `tokens/` above which every second file of its older half is removed."""

    @model_validator(mode="after")
    def _every_option_acts(self) -> Self:
        if self.token_groups_per_step == 0 and self.token_gib != type(self).model_fields["token_gib"].default:
            raise ValueError("token_gib has no effect with token_groups_per_step=0")
        if self.sample_groups_per_step == 0 and self.keep_samples != "all":
            raise ValueError("keep_samples has no effect with sample_groups_per_step=0")
        return self
