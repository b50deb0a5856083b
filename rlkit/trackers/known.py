"""Trackers by name, or by the dotted path of a user's class."""

from __future__ import annotations

from collections.abc import Mapping

from rlkit.experience.names import NotFoundError, find_class
from rlkit.trackers.base import RunTracker, TrackerConfig
from rlkit.trackers.boards import SwanLab, Trackio, Wandb
from rlkit.trackers.mlflow import MLflow
from rlkit.trackers.tensorboard import TensorBoard

BUILT_IN = (TensorBoard, Wandb, MLflow, Trackio, SwanLab)
TRACKERS: Mapping[str, type[RunTracker]] = {cls.Config.model_fields["kind"].default: cls for cls in BUILT_IN}


def tracker_class(kind: str) -> type[RunTracker]:
    """Return the class. Raises NotFoundError for a dotted path without such a class."""
    cls: type[RunTracker] = TRACKERS.get(kind) or find_class("tracker", kind, RunTracker)
    if not issubclass(cls.Config, TrackerConfig):
        raise NotFoundError(f"its Config must be a subclass of {TrackerConfig.__module__}.TrackerConfig")
    return cls
