"""From command-line arguments to a resolved run: validate, check; all problems at once, nothing started."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from rlkit.config.checks import run_checks
from rlkit.config.compose import conf_dir
from rlkit.config.loading import TARGET, Loading
from rlkit.config.model_folder import ModelFolderError, ModelShape, check_model_folder
from rlkit.config.parts import CONTRACTS, Part
from rlkit.config.problems import ConfigError, Problem
from rlkit.config.resolved import ResolvedRun
from rlkit.config.schema import RunConfig


def load_config(arguments: Sequence[str], file: Path | None = None, elsewhere: Collection[str] = ()) -> ResolvedRun:
    """The run that `arguments` (Hydra overrides) describe, on top of a configuration file if there is one.

    `elsewhere` are paths that may exist only where the run will be: what a check finds about them is a warning.
    Raises ConfigError with every problem. Imports nothing heavier than the modules of the chosen parts.
    """
    loading = _RunLoading(arguments, file, elsewhere)
    loading.validate()
    loading.check()
    return loading.result()


class _RunLoading(Loading):
    """The configuration of `rlkit.train`: its checks and its result."""

    def __init__(self, arguments: Sequence[str], file: Path | None, elsewhere: Collection[str]) -> None:
        super().__init__(arguments, file, folder=conf_dir(), schema=RunConfig, contracts=CONTRACTS)
        self.elsewhere = elsewhere

    def check(self) -> None:
        """Make what the checks look at, and run those that can be run."""
        checked = dict(self.available)
        if "model" in checked:
            checked["model_shape"] = _shape_or_error(checked["model"].path)
        for kind, part in self.parts.items():
            made = self._make(kind, part)
            if made is not None:
                checked[kind] = made
        for finding in run_checks(checked):
            problem = Problem(self.sources.where(finding.key, self._value(finding.key)), finding.message)
            harmless = finding.warning or any(path in str(problem) for path in self.elsewhere)
            (self.warnings if harmless else self.problems).append(problem)

    def _make(self, kind: str, part: Part) -> Any:
        """What a check sees of a part: an algorithm and a data source themselves, of a reward class and config."""
        try:
            if kind == "algorithm":
                return part.cls(part.config)
            if kind == "data":
                return part.cls(part.config, self.available["seed"]) if "seed" in self.available else None
        except Exception as error:  # a constructor of the user's may raise anything
            where = self.sources.where(f"{kind}.{TARGET}", self.tree[kind][TARGET])
            self.problems.append(Problem(where, f"cannot be made: {type(error).__name__}: {error}"))
            return None
        return part

    def _value(self, key: str) -> Any:
        """The value that `key` has, defaults included; None for what is no single value."""
        section, _, leaf = key.rpartition(".")
        holder = self.parts[section].config if section in self.parts else self.available.get(section)
        return getattr(holder, leaf, None) if section else self.available.get(key)

    def result(self) -> ResolvedRun:
        """The resolved run. Raises ConfigError if there is any problem."""
        if self.problems:
            raise ConfigError(list(dict.fromkeys(self.problems)))
        full = {
            kind: {TARGET: self.tree[kind][TARGET], **part.config.model_dump(mode="json")}
            for kind, part in self.parts.items()
        }
        return ResolvedRun(
            config=RunConfig(**self.available, **full),
            **{f"{kind}_class": part.cls for kind, part in self.parts.items()},
            **{f"{kind}_config": part.config for kind, part in self.parts.items()},
            warnings=tuple(self.warnings),
        )


def _shape_or_error(path: str) -> ModelShape | ModelFolderError:
    try:
        return check_model_folder(path)
    except ModelFolderError as error:
        return error
