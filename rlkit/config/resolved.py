"""A configuration that passed every check, with the classes it names; and its file in the run folder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

import rlkit
from algorithms.base import Algorithm, AlgorithmConfig
from rewards.base import Reward, RewardConfig
from rlkit.config.problems import Problem
from rlkit.config.schema import RunConfig
from rlkit.data.base import DataConfig, DataSource


@dataclass(frozen=True)
class ResolvedRun:
    """Everything a run needs to know. Cheap to pickle: classes travel by name."""

    config: RunConfig
    """All values filled in, also those of the swappable parts (`config.reward["_target_"]`, ...)."""
    algorithm_class: type[Algorithm]
    algorithm_config: AlgorithmConfig
    reward_class: type[Reward]
    reward_config: RewardConfig
    data_class: type[DataSource]
    data_config: DataConfig
    warnings: tuple[Problem, ...] = ()
    """What the user should know although the run can start."""

    def make_algorithm(self) -> Algorithm:
        """The configured algorithm."""
        return self.algorithm_class(self.algorithm_config)

    def make_data_source(self) -> DataSource:
        """The configured data source."""
        return self.data_class(self.data_config, self.config.seed)


def plain(config: RunConfig) -> dict[str, Any]:
    """The whole configuration as plain values, in the schema's order."""
    return config.model_dump(mode="json")


def config_text(config: RunConfig) -> str:
    """The content of the run folder's `config.yaml`, every value spelled out; `--config FILE` reads it again."""
    head = f"# Written by rlkit {rlkit.__version__}. The same run again: python -m rlkit.train --config THIS_FILE\n"
    values: str = yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True)
    return head + values
