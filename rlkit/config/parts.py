"""Swappable parts: the class that `_target_` names, checked against its contract; and a run with all its parts."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

import rlkit
from algorithms.base import Algorithm, AlgorithmConfig
from rewards.base import Reward, RewardConfig
from rlkit.config.messages import ConfigIssue
from rlkit.config.schema import RunConfig
from rlkit.data.base import DataConfig, DataSource
from rlkit.environments.base import Environment, EnvironmentConfig
from rlkit.experience import UserError
from rlkit.experience.names import NotFoundError, find_class

TARGET = "_target_"


def conf_dir() -> Path:
    """Return the folder of Hydra groups: inside an installed package, or next to it in a checkout.

    Raises FileNotFoundError if neither exists (an incomplete installation).
    """
    package = Path(rlkit.__file__).resolve().parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise FileNotFoundError(f"no conf/config.yaml in {package} or next to it: rlkit is not completely installed")


@cache
def _moved_classes() -> Mapping[str, str]:
    moved: dict[str, str] = yaml.safe_load((conf_dir() / "moved.yaml").read_text())
    return moved


def with_present_targets(value: Any) -> Any:
    """Replace each `_target_` of a class that has moved (`conf/moved.yaml`) by its current path."""
    if isinstance(value, Mapping):
        return {
            key: _moved_classes().get(inner, inner)
            if key == TARGET and isinstance(inner, str)
            else with_present_targets(inner)
            for key, inner in value.items()
        }
    return [with_present_targets(inner) for inner in value] if isinstance(value, list) else value


@dataclass(frozen=True)
class Contract:
    base: type
    config: type[BaseModel]
    optional: bool = False
    """Whether `_target_: null` is allowed and means no such part."""


CONTRACTS = {
    "algorithm": Contract(Algorithm, AlgorithmConfig),
    "reward": Contract(Reward, RewardConfig),
    "data": Contract(DataSource, DataConfig),
    "verifier": Contract(Reward, RewardConfig),
    "environment": Contract(Environment, EnvironmentConfig, optional=True),
}


@dataclass(frozen=True)
class Part:
    cls: Any
    config: Any


class PartError(UserError, ValueError): ...


def import_part(kind: str, target: Any, contract: Contract | None = None) -> Any:
    """Return the class at dotted path `target`, checked as a part of this kind (or against a command's own `contract`).
    Raises PartError."""
    contract = contract or CONTRACTS[kind]
    cls = import_class(kind, target, contract.base)
    config = getattr(cls, "Config", None)
    if not (inspect.isclass(config) and issubclass(config, contract.config)):
        raise PartError(f"its Config must be a subclass of {contract.config.__module__}.{contract.config.__name__}")
    return cls


def import_class(kind: str, target: Any, base: type) -> Any:
    """Return the concrete subclass of `base` at dotted path `target`, which may be an old path. Raises PartError."""
    try:
        return find_class(kind, _moved_classes().get(target, target) if isinstance(target, str) else target, base)
    except NotFoundError as error:
        raise PartError(str(error)) from error


OWN = ""
"""Name of the held-out set of the run's own data, as opposed to the named ones in `evaluation.sets`."""


@dataclass(frozen=True)
class HeldoutSet:
    """One of `evaluation.sets`."""

    source: type[DataSource]
    config: DataConfig
    prompts: int | None
    """None: `trainer.evaluation_prompts`."""

    def section(self) -> dict[str, Any]:
        """Return the section as in the configuration, with every value filled in."""
        target = f"{self.source.__module__}.{self.source.__qualname__}"
        return {TARGET: target, **self.config.model_dump(mode="json"), "prompts": self.prompts}


@dataclass(frozen=True)
class ResolvedRun:
    config: RunConfig
    """With all values filled in, including those of the swappable parts (`config.reward["_target_"]`, ...)."""
    algorithm_class: type[Algorithm]
    algorithm_config: AlgorithmConfig
    reward_class: type[Reward]
    reward_config: RewardConfig
    data_class: type[DataSource]
    data_config: DataConfig
    verifier_class: type[Reward]
    verifier_config: RewardConfig
    source: DataSource
    """The instance of `data_class` that the checks used; it keeps what it drew or read for them."""
    environment_class: type[Environment] | None = None
    environment_config: EnvironmentConfig | None = None
    sets: Mapping[str, HeldoutSet] = field(default_factory=dict)
    """Further held-out problems by name."""
    warnings: tuple[ConfigIssue, ...] = ()
    origins: Mapping[str, str] = field(default_factory=dict)
    """Full key -> where its value comes from, for the keys whose origin the plan shows."""
    elsewhere: bool = False
    """Whether the run will be on other machines than this one."""

    def make_algorithm(self) -> Algorithm:
        return self.algorithm_class(self.algorithm_config)

    def make_set(self, name: str) -> DataSource:
        """Make the source of a further held-out set."""
        one = self.sets[name]
        return make_source(one.source, one.config, self.config.seed, self.environment_class, self.environment_config)


def make_source(
    cls: type[DataSource],
    config: DataConfig,
    seed: int,
    environment: type[Environment] | None,
    options: EnvironmentConfig | None,
) -> DataSource:
    """Make a data source. `environment` and its `options`: the run's, if it has one."""
    source = cls(config, seed)
    if environment is not None:
        source.take_environment(environment, options)
    return source


def plain(config: RunConfig) -> dict[str, Any]:
    return config.model_dump(mode="json")


def config_text(config: RunConfig) -> str:
    """Return the text of the run folder's `config.yaml`, with every value filled in; `--config FILE` reads it."""
    head = f"# Written by rlkit {rlkit.__version__}. The same run again: python -m rlkit.train --config THIS_FILE\n"
    values: str = yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True)
    return head + values
