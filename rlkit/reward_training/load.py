"""From command-line arguments to a resolved reward training; all problems at once, nothing started."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import rlkit
from rlkit.config.loading import Loading
from rlkit.config.messages import ConfigError, Problem, all_fields
from rlkit.config.parts import TARGET, Contract, conf_dir
from rlkit.data.base import DataConfig
from rlkit.reward_training.base import RewardTraining, RewardTrainingConfig, TrainRewardConfig

CONTRACTS = {"reward": Contract(RewardTraining, RewardTrainingConfig)}


@dataclass(frozen=True)
class ResolvedRewardTraining:
    """A configuration that passed every check. Cheap to pickle: classes travel by name."""

    config: TrainRewardConfig
    """All values filled in, also those of `reward` and `data`."""
    backend: type[RewardTraining]
    reward: RewardTrainingConfig
    data: DataConfig

    def text(self) -> str:
        """The content of the run folder's `config.yaml`; `--config FILE` reads it again."""
        head = f"# Written by rlkit {rlkit.__version__}. Again: python -m rlkit.train_reward --config THIS_FILE\n"
        values: str = yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        return head + values


def groups_dir() -> Path:
    """The folder of this command's Hydra groups."""
    return conf_dir() / "train_reward"


def load_reward_training(arguments: Sequence[str], file: Path | None = None) -> ResolvedRewardTraining:
    """The training that `arguments` describe, on top of a configuration file if there is one.

    Raises ConfigError with every problem.
    """
    loading = _Loading(arguments, file, folder=groups_dir(), schema=TrainRewardConfig, contracts=CONTRACTS)
    loading.validate()
    loading.check()
    return loading.result()


class _Loading(Loading):
    """The section `data` has the type that the backend gives it."""

    _backend: type[RewardTraining] | None = None
    _known: Sequence[str] = ()
    _data: Any = None

    def _known_keys(self, configs: Mapping[str, Any]) -> list[str]:
        self._backend = configs.get("reward")
        fields = [] if self._backend is None else [key for key, _ in all_fields(self._backend.Data, "data.")]
        self._known = [key for key in super()._known_keys(configs) if key != "data"] + fields
        return list(self._known)

    def validate(self) -> None:
        """All sections, and last the data's."""
        super().validate()
        content = self.tree.get("data") or {}
        if self._backend is not None and isinstance(content, dict):  # if it is none, that is reported already
            self._data = self._section(self._backend.Data, content, "data.", self._known)

    def check(self) -> None:
        """The backend's own checks, where it and its data are of the right type."""
        backend, stage = self._backend, self.available.get("stage")
        if backend is None:
            return
        if stage is not None and stage not in backend.stages:
            message = f"{backend.__name__} can only {' and '.join(backend.stages)}"
            self.problems.append(Problem(self.sources.where("stage", stage), message))
        if self._data is not None and "reward" in self.parts:
            for message in backend.check(self.parts["reward"].config, self._data):
                key, _, text = message.partition(": ")
                self.problems.append(Problem(key, text))

    def result(self) -> ResolvedRewardTraining:
        """What passed. Raises ConfigError if there is any problem."""
        if self.problems:
            raise ConfigError(list(dict.fromkeys(self.problems)))
        part = self.parts["reward"]
        full = {"data": self._data.model_dump(mode="json")}
        full["reward"] = {TARGET: self.tree["reward"][TARGET], **part.config.model_dump(mode="json")}
        return ResolvedRewardTraining(
            TrainRewardConfig(**{**self.available, **full}), part.cls, part.config, self._data
        )
