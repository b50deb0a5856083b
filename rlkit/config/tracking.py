"""The section `tracking`: what a run writes and shows."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

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
