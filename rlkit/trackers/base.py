"""The contract of a tracker: it shows the numbers, texts and warnings of a run somewhere else."""

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
"""How a run ended: by itself, by a signal, by an error; `running`: only what is recorded so far was sent."""

RESUMED = "run/resumed_after"
"""A number beside all that a resumed run sends: the step of its checkpoint. What was sent before without it, or with
another, after this step is of the attempt that ended."""


class TrackerConfig(Named):
    """Fields of every tracker; one nests a subclass as `Config`."""

    sample_groups: int = Field(default=4, ge=0)
    """Groups whose best and worst response are sent, about 100 times in a run, widest spread of rewards first. 0: no
    texts leave the run folder."""

    @model_validator(mode="before")
    @classmethod
    def _keeps_no_secret(cls, fields: Any) -> Any:
        for name in fields if isinstance(fields, Mapping) else ():
            if name not in cls.model_fields and re.search(r"key|token|secret|password", str(name)):
                raise ValueError(f"takes {name} from the environment alone: a configuration is written to config.yaml")
        return fields

    @property
    def name(self) -> str:
        """Of its entry in trackers.json."""
        return self.kind.rpartition(".")[2]


class ProjectConfig(TrackerConfig):
    project: str | None = None
    """Project (MLflow: experiment) of the run. null: what the tracker's own environment variable says, else rlkit."""

    def project_name(self, variable: str) -> str:
        return self.project or os.environ.get(variable) or "rlkit"


@dataclass(frozen=True)
class Started:
    id: str
    """What `resume_id` is when the run goes on."""
    where: str = ""
    """Address or folder, for the user."""


class RunTracker(ABC):
    """Subclass it, nest a `Config`, and name it by its dotted path in `tracking.trackers`.

    All methods run in one thread of their own, one after the other. What they raise is shown once and does not end the
    run; a call that hangs is left behind at the end of the run.
    """

    Config: ClassVar[type[TrackerConfig]] = TrackerConfig
    modules: ClassVar[tuple[str, ...]] = ()
    """Imported before anything starts; without the package of the first, the configuration is refused."""

    def __init__(self, config: Any) -> None:
        self.config = config

    @classmethod
    def check(cls, config: Any) -> Iterable[str]:
        """Why it cannot work here: messages for the user."""
        for module in cls.modules[:1]:
            yield from lacking(module.partition(".")[0], config.kind)

    @abstractmethod
    def start(
        self, config: Mapping[str, Any], name: str, folder: Path, resume_id: str | None, first_step: int
    ) -> Started:
        """`config`: the run's, as plain values; `name`: of its `folder`. `resume_id`: what `start` returned for this
        folder before; steps from `first_step` on are sent again, and were not those of this attempt."""

    @abstractmethod
    def scalars(self, step: int, values: Mapping[str, float], time: float) -> None:
        """Of a training step or an evaluation after it, at this Unix time. Values may be nan or infinite."""

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:  # noqa: B027 (not all show texts)
        """Rows of samples.jsonl: the best and the worst of some groups."""

    def alert(self, level: Level, title: str, text: str) -> None:  # noqa: B027
        """A warning of the run, or its early end."""

    def close(self, status: Status) -> None:  # noqa: B027
        """Send what is left."""
