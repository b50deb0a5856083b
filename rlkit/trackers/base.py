"""The contract of a tracker, which shows a run's metrics, texts and warnings elsewhere."""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from rlkit.experience.extras import lacking
from rlkit.experience.section import Named

Level = Literal["info", "warn", "error"]
Status = Literal["finished", "stopped", "failed", "running"]
"""How a run ended: normally, by a signal, by an error; `running`: only what was recorded so far has been sent."""

RESUMED = "run/resumed_after"
"""Metric that a resumed run sends with all others: the step of its checkpoint. Values after this step that have no such
metric, or another value of it, are from an earlier attempt."""


class TrackerConfig(Named):
    """Fields of every tracker. A tracker nests a subclass as `Config`."""

    sample_groups: int = Field(default=4, ge=0)
    """Number of groups, widest spread of rewards first, whose best and worst responses are sent about 100 times in a
    run. 0: no texts leave the run folder."""

    @model_validator(mode="before")
    @classmethod
    def _keeps_no_secret(cls, fields: Any) -> Any:
        for name in fields if isinstance(fields, Mapping) else ():
            if name not in cls.model_fields and re.search(r"key|token|secret|password", str(name)):
                raise ValueError(f"takes {name} only from the environment: the configuration is written to config.yaml")
        return fields

    @property
    def name(self) -> str:
        """Name of its entry in trackers.json."""
        return self.kind.rpartition(".")[2]


class ProjectConfig(TrackerConfig):
    project: str | None = None
    """Project (MLflow: experiment) of the run. null: the one in the tracker's own environment variable, else rlkit."""

    def project_name(self, variable: str) -> str:
        return self.project or os.environ.get(variable) or "rlkit"


@dataclass(frozen=True)
class Started:
    id: str
    """Passed as `resume_id` when the run is resumed."""
    where: str = ""
    """Address or folder, for the user."""


class RunTracker(ABC):
    """Subclass it, nest a `Config`, and name it by its dotted path in `tracking.trackers`.

    All methods run in a separate thread, one after the other. An exception is shown once and does not end the run; a
    call that hangs is abandoned at the end of the run.
    """

    Config: ClassVar[type[TrackerConfig]] = TrackerConfig
    modules: ClassVar[tuple[str, ...]] = ()
    """Modules to import before anything starts. Without the package of the first, the configuration is refused."""

    def __init__(self, config: Any) -> None:
        self.config = config

    @classmethod
    def check(cls, config: Any) -> Iterable[str]:
        """Yield why the tracker cannot work here: messages for the user."""
        for module in cls.modules[:1]:
            yield from lacking(module.partition(".")[0], config.kind)

    @abstractmethod
    def start(
        self, config: Mapping[str, Any], name: str, folder: Path, resume_id: str | None, first_step: int
    ) -> Started:
        """Start. `config`: the run's, as plain values; `name`: that of its `folder`. `resume_id`: the id that `start`
        returned for this folder before. Steps from `first_step` on are sent again; earlier values of these steps are
        from another attempt."""

    @abstractmethod
    def scalars(self, step: int, values: Mapping[str, float], time: float) -> None:
        """Send the metrics of a training step, or of an evaluation after it, at this Unix time. Values may be nan or
        infinite."""

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:  # noqa: B027 (not all show texts)
        """Send rows of samples.jsonl: the best and the worst of some groups."""

    def alert(self, level: Level, title: str, text: str) -> None:  # noqa: B027
        """Send a warning of the run, or report its early end."""

    def close(self, status: Status) -> None:  # noqa: B027
        """Send everything that is left."""
