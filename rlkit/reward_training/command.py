"""Runs `python -m rlkit.train_reward`, from its arguments through a checked configuration to a summary."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape

import rlkit
from rlkit.config.command import print_error
from rlkit.config.compose import group_options, headline, option_fields
from rlkit.config.help import print_section
from rlkit.config.loading import Loading
from rlkit.config.machine import refuse_fewer_gpus
from rlkit.config.messages import ConfigError, ConfigIssue, all_fields
from rlkit.config.parts import TARGET, Contract, PartError, conf_dir, import_part
from rlkit.data.base import DataConfig
from rlkit.experience import UserError
from rlkit.experience.extras import refuse_without
from rlkit.reward_training.base import RewardTraining, RewardTrainingConfig, TrainingContext, TrainRewardConfig
from rlkit.reward_training.ranks import (
    FAILED,
    INTERRUPTED,
    TERMINATED,
    RankHangsError,
    Terminated,
    join_ranks,
    naming_a_hang,
    raises_terminated,
    run_ranks,
)
from rlkit.reward_training.report import RunReport, SilentReport
from rlkit.tracking.run_folder import RunFolder

LIMIT = "rank_timeout_seconds"
USAGE = """\
[bold]python -m rlkit.train_reward[/] reward=NAME data.path=FILE \\[key=value ...] \\[--config FILE]

  python -m rlkit.train_reward reward=implicit_prm data.path=rollouts.jsonl reward.model_path=path/to/model
  python -m rlkit.train_reward reward=implicit_prm stage=evaluate data.path=heldout.jsonl \\
      reward.model_path=runs/old/model reward.reference_path=path/to/model
  python -m rlkit.train_reward experiment=tulu3_rm data.path=pairs.jsonl    (or implicit_prm_8b; docs/recipes.md)
  python -m rlkit.train_reward reward._target_=my_module.MyTraining data.path=rows.jsonl

  --config FILE  start from the values of a configuration file, for example an old run's
  dry_run=true   validate and exit
"""
CONTRACTS = {"reward": Contract(RewardTraining, RewardTrainingConfig)}


@dataclass(frozen=True)
class ResolvedRewardTraining:
    """A configuration that passed every check. Cheap to pickle: classes are pickled by name."""

    config: TrainRewardConfig
    """All values filled in, including those of `reward` and `data`."""
    backend: type[RewardTraining]
    reward: RewardTrainingConfig
    data: DataConfig

    def text(self) -> str:
        """Return the content of the run folder's `config.yaml`, which `--config FILE` reads."""
        head = f"# Written by rlkit {rlkit.__version__}. To repeat: python -m rlkit.train_reward --config THIS_FILE\n"
        values: str = yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        return head + values


def groups_dir() -> Path:
    return conf_dir() / "train_reward"


def load_reward_training(arguments: Sequence[str], file: Path | None = None) -> ResolvedRewardTraining:
    """Compose `arguments` on top of a configuration file if there is one. Raise ConfigError with every problem."""
    loading = _Loading(arguments, file, folder=groups_dir(), schema=TrainRewardConfig, contracts=CONTRACTS)
    loading.validate()
    loading.check()
    return loading.result()


class _Loading(Loading):
    _backend: type[RewardTraining] | None = None
    _known: Sequence[str] = ()
    _data: Any = None

    def _known_keys(self, configs: Mapping[str, Any]) -> list[str]:
        self._backend = configs.get("reward")
        fields = [] if self._backend is None else [key for key, _ in all_fields(self._backend.Data, "data.")]
        self._known = [key for key in super()._known_keys(configs) if key != "data"] + fields
        return list(self._known)

    def validate(self) -> None:
        super().validate()
        content = self.tree.get("data") or {}
        if self._backend is not None and isinstance(content, dict):  # if it is not one, that has been reported already
            self._data = self._section(self._backend.Data, content, "data.", self._known)

    def check(self) -> None:
        backend, stage = self._backend, self.available.get("stage")
        if backend is None:
            return
        if stage is not None and stage not in backend.stages:
            message = f"{backend.__name__} can only {' and '.join(backend.stages)}"
            self.problems.append(ConfigIssue(self.sources.where("stage", stage), message))
        if stage == "evaluate":
            for key in ("heldout_path", "heldout_split", "heldout_share"):
                if f"data.{key}" in self.overrides.typed:
                    remedy = "all rows of data.path are judged"
                    self.problems.append(ConfigIssue(f"data.{key}", f"has no effect with stage=evaluate: {remedy}"))
        if self._data is not None and "reward" in self.parts:
            for message in backend.check(self.parts["reward"].config, self._data):
                key, _, text = message.partition(": ")
                self.problems.append(ConfigIssue(key, text))

    def result(self) -> ResolvedRewardTraining:
        if self.problems:
            raise ConfigError(list(dict.fromkeys(self.problems)))
        part = self.parts["reward"]
        full = {"data": self._data.model_dump(mode="json")}
        full["reward"] = {TARGET: self.tree["reward"][TARGET], **part.config.model_dump(mode="json")}
        return ResolvedRewardTraining(
            TrainRewardConfig(**{**self.available, **full}), part.cls, part.config, self._data
        )


# -- help --------------------------------------------------------------------------------------------------------------


def print_help() -> None:
    console = Console()
    console.print(USAGE, highlight=False)
    top = [(name, info) for name, info in TrainRewardConfig.model_fields.items() if name not in ("reward", "data")]
    print_section(console, "Run", "", top)
    for option in group_options(groups_dir())["reward"]:
        target = option_fields(groups_dir(), "reward", option).get(TARGET)
        try:
            cls = import_part("reward", target, CONTRACTS["reward"])
        except PartError as error:
            console.print(f"\n[bold]reward={option}[/]: {escape(str(target))} {escape(str(error))}")
            continue
        print_section(console, f"reward={option}", headline(cls), all_fields(cls.Config, "reward."))
        print_section(console, f"data, with reward={option}", "", all_fields(cls.Data, "data."))


# -- running -----------------------------------------------------------------------------------------------------------


def launch(resolved: ResolvedRewardTraining) -> int:
    """Return 0, 1 after an explained error, 130 after Ctrl-C, 143 after SIGTERM. Raises NotInstalledError, and
    ConfigError if there are too few GPUs."""
    refuse_without("torch", "transformers", "deepspeed")
    if resolved.config.device == "cuda":
        refuse_fewer_gpus(resolved.reward.ranks, "device=cuda", "each rank (reward.ranks) takes one")
    return run_ranks(resolved.reward.ranks, resolved.config.rank_timeout_seconds, LIMIT, run_rank, resolved)


def run_rank(rank: int, port: int, resolved: ResolvedRewardTraining) -> int:
    """Train on one rank and return the exit code. Rank 0 has the run folder."""
    seconds, ranks = resolved.config.rank_timeout_seconds, resolved.reward.ranks
    try:
        with raises_terminated(), naming_a_hang(rank, ranks, seconds, LIMIT):
            if rank:
                _run(rank, resolved, SilentReport(), port)
                return 0
            folder = RunFolder(resolved.config.run_dir)
            folder.write_config(resolved.text())
            with RunReport(folder) as report, folder.given_back():
                report.finish(_run(rank, resolved, report, port))
            return 0
    except KeyboardInterrupt:
        return _ended(ranks, "interrupted", INTERRUPTED)
    except Terminated:
        return _ended(ranks, "ended by SIGTERM", TERMINATED)
    except Exception as error:
        if not isinstance(error, UserError):
            logs = resolved.config.run_dir / "logs"
            trace = "".join(traceback.format_exception(error))
            print(f"{trace}rlkit: {type(error).__name__}: {error}", file=sys.stderr)
            print(f"The output of libraries is in {logs}/driver.log.", file=sys.stderr)
        elif rank == 0 or isinstance(error, RankHangsError):
            print_error(error)
        return FAILED


def _run(rank: int, resolved: ResolvedRewardTraining, report: Any, port: int) -> dict[str, Any]:
    began, config, reward = time.monotonic(), resolved.config, resolved.reward
    report.phase("loading libraries")
    join_ranks(
        rank, reward.ranks, port, config.device, config.threads, config.seed, seconds=config.rank_timeout_seconds
    )
    context = TrainingContext(config.run_dir, config.device, config.seed, rank, config.stage)
    backend = resolved.backend(resolved.reward, resolved.data, context)
    summary = backend.run(report)
    return {**summary, "wall_seconds": round(time.monotonic() - began, 3)}


def _ended(ranks: int, how: str, code: int) -> int:
    if ranks == 1:  # otherwise the parent of the ranks reports it
        print(f"rlkit: {how}", file=sys.stderr)
    return code
