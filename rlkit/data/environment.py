"""`data=environment`: the tasks that the run's environment provides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rlkit.data.base import BadRow, DataConfig, DataError, DataSource, Problem, Split
from rlkit.environments.base import Environment, Task
from rlkit.experience import UserError
from rlkit.experience.section import Seed

PREVIEWED = 64


class EnvironmentSource(DataSource):
    """The tasks that the environment provides."""

    class Config(DataConfig):
        task_seed: Seed = 2026
        """Seed for drawing the tasks, if they are drawn. Separate from the run's `seed`, so that all runs share the
        held-out ones."""

    def __init__(self, config: Any, seed: int) -> None:
        super().__init__(config, seed)
        self.environment: type[Environment] | None = None
        self.options: Any = None
        self._known: dict[Split, Sequence[Task]] = {}

    def take_environment(self, environment: type[Environment], options: Any) -> None:
        self.environment, self.options = environment, options

    def check(self) -> list[str]:
        try:
            self._tasks("train")
        except DataError as error:
            return [str(error)]
        return []

    def preview(self, split: Split) -> list[Problem]:
        return [_problem(task) for task in self._tasks(split)[:PREVIEWED]]

    def load(self, split: Split) -> tuple[list[Problem], list[BadRow]]:
        tasks = self._tasks(split)
        ids = {task.id for task in tasks}
        if len(ids) < len(tasks):
            raise DataError(f"{self._name} has {len(tasks)} {split} tasks with only {len(ids)} different ids")
        return [_problem(task) for task in tasks], []

    def provides(self) -> frozenset[str]:
        try:
            tasks = self._tasks("train")[:PREVIEWED]
        except DataError:
            return frozenset()
        own: dict[str, Callable[[Task], bool]] = {
            "answer": lambda task: task.answer is not None,
            "references": lambda task: bool(task.references),
        }
        columns = frozenset.intersection(*(frozenset(task.columns) for task in tasks)) if tasks else frozenset[str]()
        return columns | {name for name, has in own.items() if tasks and all(map(has, tasks))}

    @property
    def _name(self) -> str:
        return "the environment" if self.environment is None else self.environment.__name__

    def _tasks(self, split: Split) -> Sequence[Task]:
        """Return the tasks of a split. Raises DataError if there are none."""
        if split in self._known:
            return self._known[split]
        if self.environment is None:
            raise DataError("data=environment has the tasks of an environment, but there is none: add environment=NAME")
        try:
            tasks = self.environment.tasks(self.options, split, self.config.task_seed)
        except UserError as error:
            raise DataError(f"{self._name}: {error}") from error
        if tasks is None:
            raise DataError(f"{self._name} has no tasks: choose other data, like data=jsonl data.path=FILE")
        if wrong := next((task for task in tasks[:PREVIEWED] if not isinstance(task, Task)), None):
            raise DataError(f"{self._name}.tasks() must return Tasks, not {type(wrong).__name__}")
        self._known[split] = tasks
        return tasks


def _problem(task: Task) -> Problem:
    return Problem(task.id, task.messages, task.references, task.answer, task.columns, origin=f"task {task.id}")
