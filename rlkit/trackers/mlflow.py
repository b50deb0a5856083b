"""MLflow: metrics, the configuration as parameters, samples as a table. `MLFLOW_TRACKING_URI` is the destination."""

from __future__ import annotations

import re
import time as clock
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlkit.trackers.base import RESUMED, Level, ProjectConfig, RunTracker, Started, Status
from rlkit.trackers.rows import COLUMNS, table_row

PARAMETERS = 100
"""Most parameters per request."""
LONGEST = 500
"""Most characters of a parameter's value in older servers."""
ENDS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class MLflowConfig(ProjectConfig):
    kind: str = "mlflow"


class MLflow(RunTracker):
    """A metric keeps all values sent for a step; charts show the latest."""

    Config = MLflowConfig
    config: MLflowConfig
    modules = ("mlflow", "mlflow.entities", "mlflow.tracking")

    def start(
        self, config: Mapping[str, Any], name: str, folder: Path, resume_id: str | None, first_step: int
    ) -> Started:
        import mlflow
        from mlflow.entities import Param

        self._client = mlflow.MlflowClient()
        self._mark = {} if resume_id is None else {RESUMED: float(first_step - 1)}
        if resume_id is not None:
            self._id = resume_id
            self._client.update_run(resume_id, status="RUNNING")
        else:
            project = self.config.project_name("MLFLOW_EXPERIMENT_NAME")
            experiment = self._client.get_experiment_by_name(project)
            place = self._client.create_experiment(project) if experiment is None else experiment.experiment_id
            self._id = self._client.create_run(place, run_name=name, tags={"rlkit.run_dir": str(folder)}).info.run_id
            parameters = [Param(_named(key), text[:LONGEST]) for key, text in _leaves(config)]
            for start in range(0, len(parameters), PARAMETERS):
                self._client.log_batch(self._id, params=parameters[start : start + PARAMETERS])
        return Started(self._id, f"{mlflow.get_tracking_uri()}, run {self._id}")

    def scalars(self, step: int, values: Mapping[str, float], time: float) -> None:
        from mlflow.entities import Metric

        milliseconds = int(time * 1000)
        metrics = [Metric(_named(key), value, milliseconds, step) for key, value in {**values, **self._mark}.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        columns = zip(*(table_row(step, row) for row in rows), strict=True)
        table = {name: list(values) for name, values in zip(COLUMNS, columns, strict=True)}
        mark = {name: [value] * len(rows) for name, value in self._mark.items()}
        self._client.log_table(self._id, table | mark, "samples.json")

    def alert(self, level: Level, title: str, text: str) -> None:
        self._client.log_text(self._id, f"{level}: {title}\n{text}\n", f"alerts/{clock.time_ns()}.txt")

    def close(self, status: Status) -> None:
        if status in ENDS:
            self._client.set_terminated(self._id, ENDS[status])


def _named(key: str) -> str:
    """Replace characters that MLflow does not accept."""
    return re.sub(r"[^\w.\- :/]", "_", key)


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}" if key else str(name))
    else:
        yield key, str(value)
