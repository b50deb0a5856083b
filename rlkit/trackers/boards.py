"""W&B, Trackio and SwanLab: three packages with the same interface (`init`, `log`, `finish`).

Keys, addresses and offline mode are set by their own environment variables.
"""

from __future__ import annotations

import importlib
import os
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from rlkit.trackers.base import RESUMED, Level, ProjectConfig, RunTracker, Started, Status
from rlkit.trackers.rows import COLUMNS, conversation, facts, prompt_text, response_text, table_row


class Board(RunTracker):
    """The common base of the three. If one keeps values sent before a resume, `RESUMED` marks the later ones."""

    Config = ProjectConfig
    config: ProjectConfig
    variable: ClassVar[str]
    """Environment variable that names the project."""
    run: Any
    """The return value of the package's `init`."""

    def start(
        self, config: Mapping[str, Any], name: str, folder: Path, resume_id: str | None, first_step: int
    ) -> Started:
        self.package: Any = importlib.import_module(self.modules[0])
        self.mark = {} if resume_id is None else {RESUMED: float(first_step - 1)}
        project = self.config.project_name(self.variable)
        return self.init(folder, resume_id, project=project, name=name, config=dict(config))

    @abstractmethod
    def init(self, folder: Path, resume_id: str | None, **shared: Any) -> Started: ...

    def scalars(self, step: int, values: Mapping[str, float], time: float) -> None:
        self.run.log({**values, **self.mark}, step=step)

    def close(self, status: Status) -> None:
        self.run.finish()


class WandbConfig(ProjectConfig):
    kind: str = "wandb"


class Wandb(Board):
    """Steps are a separate column, because W&B's own steps never go back, as those of a resumed run do."""

    Config = WandbConfig
    modules = ("wandb",)
    variable = "WANDB_PROJECT"

    def init(self, folder: Path, resume_id: str | None, **shared: Any) -> Started:
        self.run = self.package.init(
            **shared,
            dir=os.environ.get("WANDB_DIR", str(folder)),
            id=resume_id,
            resume=None if resume_id is None else "allow",
            settings=self.package.Settings(console="off"),  # the run keeps its own logs
        )
        self.run.define_metric("step", hidden=True)
        self.run.define_metric("*", step_metric="step")
        self._table = self.package.Table(columns=list(COLUMNS), log_mode="INCREMENTAL")
        offline = Path(self.run.dir).parent
        return Started(self.run.id, self.run.url or f"{offline} (offline; later: wandb sync {offline})")

    def scalars(self, step: int, values: Mapping[str, float], time: float) -> None:
        self.run.log({"step": step, "_timestamp": time, **values, **self.mark})

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        for row in rows:
            self._table.add_data(*table_row(step, row))
        self.run.log({"step": step, "samples": self._table, **self.mark})

    def alert(self, level: Level, title: str, text: str) -> None:
        self.run.alert(title[:63], text, level=level.upper())

    def close(self, status: Status) -> None:
        self.run.finish(exit_code=0 if status in ("finished", "running") else 1)


class TrackioConfig(ProjectConfig):
    kind: str = "trackio"


class Trackio(Board):
    Config = TrackioConfig
    modules = ("trackio",)
    variable = "TRACKIO_PROJECT"

    def init(self, folder: Path, resume_id: str | None, **shared: Any) -> Started:
        """Start the run. Trackio finds a run by its name; of several, the newest."""
        if resume_id is not None:
            shared["name"] = resume_id
        quiet = {"embed": False, "auto_log_cpu": False}  # the work is done in other processes
        self.run = self.package.init(**shared, resume="never" if resume_id is None else "allow", **quiet)
        own = f"TRACKIO_DIR={os.environ['TRACKIO_DIR']} " if "TRACKIO_DIR" in os.environ else ""
        where = self.run.url or f"{own}trackio show --project {shared['project']}"
        return Started(str(self.run.name), where)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        trace = self.package.Trace
        known = [facts(row) | {"answer": row.get("answer"), **self.mark} for row in rows]
        said = [trace(conversation(row), metadata=own) for row, own in zip(rows, known, strict=True)]
        self.run.log({"samples": said}, step=step)

    def alert(self, level: Level, title: str, text: str) -> None:
        self.run.alert(title=title, text=text, level=self.package.AlertLevel(level))


class SwanLabConfig(ProjectConfig):
    kind: str = "swanlab"


class SwanLab(Board):
    """SwanLab keeps the first values sent for a step. Offline, every attempt has its own folder."""

    Config = SwanLabConfig
    modules = ("swanlab",)
    variable = "SWANLAB_PROJ_NAME"

    def init(self, folder: Path, resume_id: str | None, **shared: Any) -> Started:
        settings = self.package.Settings(interactive=False)  # nobody would see a prompt
        logs = os.environ.get("SWANLAB_LOG_DIR", str(folder / "swanlog"))
        self.run = self.package.init(
            **shared,
            log_dir=logs,
            id=resume_id,
            resume="never" if resume_id is None else "allow",
            settings=settings,
        )
        self._step = 0
        offline = f"{self.run.dir} (offline; later: swanlab sync {self.run.dir})"
        return Started(self.run.id, self.run.url if self.run.mode == "online" else offline)

    def scalars(self, step: int, values: Mapping[str, float], time: float) -> None:
        self._step = max(self._step, step)
        super().scalars(step, values, time)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        texts = [
            self.package.Text(
                f"{prompt_text(row)}\n\n{response_text(row)}", caption=f"{row.get('rank')}, reward {row.get('reward')}"
            )
            for row in rows
        ]
        self.run.log({"samples": texts}, step=step)

    def alert(self, level: Level, title: str, text: str) -> None:
        self.run.log({f"alerts/{level}": self.package.Text(text, caption=title)}, step=self._step)

    def close(self, status: Status) -> None:
        state = {"failed": "crashed", "stopped": "aborted"}.get(status, "success")
        self.run.finish(state=state, error="an error ended the run" if status == "failed" else None)
