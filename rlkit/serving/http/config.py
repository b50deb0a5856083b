"""The configuration of `python -m rlkit.serve`: the reward's as in a run, and the server's own section."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf
from pydantic import Field

from rewards.base import Reward, RewardConfig, TrainableReward
from rlkit.config.compose import conf_dir
from rlkit.config.loading import TARGET, Loading
from rlkit.config.messages import ConfigError, Problem
from rlkit.config.parts import CONTRACTS
from rlkit.config.schema import Section

USED = {
    "reward": "the reward to serve, with its fields (reward.workers: how many processes score side by side)",
    "serve": "the server; its keys are listed below",
    "seed": "given to the reward",
    "dry_run": "validate only",
}
"""Key or group -> what it means to this command."""

LEAST_TOKEN_CHARACTERS = 16


class ServeConfig(Section):
    """The server."""

    host: str = "127.0.0.1"
    """Address to listen on. Any other than this machine's loopback needs `serve.token_env`."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port to listen on; 0 takes a free one and prints it."""
    token_env: str | None = None
    """Name of the environment variable with the token that every request must carry (Authorization: Bearer ...)."""
    device: Literal["cpu", "cuda"] = "cpu"
    """What the reward runs on."""
    threads: int = Field(default=2, ge=1)
    """CPU threads of each reward process."""
    max_batch_samples: int = Field(default=256, ge=1)
    """Waiting requests are scored together up to so many samples; one request has at most as many."""
    max_batch_tokens: int = Field(default=262144, ge=1)
    """And up to so many tokens; a single larger request is scored alone."""
    max_queued_samples: int = Field(default=4096, ge=1)
    """Samples that may wait; a request beyond that is answered 429 and should be tried again."""
    max_body_mib: float = Field(default=64.0, gt=0)
    """Larger requests are answered 413."""
    max_connections: int = Field(default=128, ge=1)
    """Requests open at a time; further ones are answered 503."""
    startup_timeout_seconds: float = Field(default=600.0, gt=0, allow_inf_nan=False)
    """The reward must have loaded and judged its first group by then, also when its process is replaced."""
    end_seconds: float = Field(default=10.0, gt=0, allow_inf_nan=False)
    """After Ctrl-C or SIGTERM, open requests may finish within this time."""


@dataclass(frozen=True)
class ResolvedServe:
    """A server's configuration that passed every check."""

    serve: ServeConfig
    reward: dict[str, Any]
    """`_target_` and all fields, defaults filled in."""
    reward_class: type[Reward]
    reward_config: RewardConfig
    seed: int
    dry_run: bool
    token: str | None

    @property
    def learns(self) -> bool:
        """Whether the reward would learn in a run of its own; served, it stays as it is."""
        cls = self.reward_class
        return issubclass(cls, TrainableReward) and cls.traits(self.reward_config).update_when != "none"


class _ServeRun(Section):
    """The whole configuration of `python -m rlkit.serve`."""

    seed: int = Field(default=0, ge=0)
    """Given to the reward."""
    dry_run: bool = False
    """Validate, exit."""
    serve: ServeConfig = ServeConfig()
    reward: dict[str, Any]
    """A swappable part: `_target_` and the fields of its `Config`."""


def load_serve_config(arguments: Sequence[str]) -> ResolvedServe:
    """What `arguments` (Hydra overrides) describe. Raises ConfigError with every problem."""
    loading = _ServeLoading(arguments)
    loading.validate()
    loading.check()
    return loading.result()


class _ServeLoading(Loading):
    """The reward as in a run, out of the same option files; no other part and no other section."""

    def __init__(self, arguments: Sequence[str]) -> None:
        used: list[str] = []
        refused: list[str] = []
        for argument in arguments:
            top = argument.lstrip("+~").partition("=")[0].partition(".")[0]
            (used if top in USED else refused).append(argument)
        contracts = {"reward": CONTRACTS["reward"]}
        super().__init__(used, None, folder=conf_dir(), schema=_ServeRun, contracts=contracts)
        self.problems += [
            Problem(argument, f"has no effect in rlkit.serve; what has: {', '.join(USED)}") for argument in refused
        ]
        if not {"reward", "reward._target_"} & set(self.overrides.typed):
            self.problems.append(
                Problem("reward", "choose what to serve: reward=rule, or reward._target_=my_module.MyReward")
            )
        self.token: str | None = None

    def _plain(self, composed: DictConfig) -> dict[str, Any]:
        """Without the sections of a run."""
        kept = [name for name in composed if name == "hydra" or name in _ServeRun.model_fields]
        return super()._plain(OmegaConf.masked_copy(composed, kept))

    def _run_config(self, known: Sequence[str]) -> None:
        """The server's section and what stands beside it."""
        own = self.tree.get("serve", {})
        if isinstance(own, dict):
            self.available["serve"] = self._section(ServeConfig, own, "serve.", known)
        else:
            message = "is a section; set its keys one by one, like serve.port=8000"
            self.problems.append(Problem(self.sources.where("serve", own), message))
        plain = {key: value for key, value in self.tree.items() if key in ("seed", "dry_run")}
        self.available["top"] = self._section(_ServeRun, {**plain, "reward": {}}, "", known)

    def check(self) -> None:
        """What the reward itself finds missing, and who could reach it."""
        if "reward" in self.parts:
            part = self.parts["reward"]
            where = self.sources.where("reward", None)
            self.problems += [Problem(where, message) for message in part.cls.check(part.config)]
        serve = self.available.get("serve")
        if isinstance(serve, ServeConfig):
            self.token, problems = _token(serve, self.sources.where)
            self.problems += problems

    def result(self) -> ResolvedServe:
        """The resolved configuration. Raises ConfigError if there is any problem."""
        if self.problems:
            raise ConfigError(list(dict.fromkeys(self.problems)))
        part, top = self.parts["reward"], self.available["top"]
        return ResolvedServe(
            serve=self.available["serve"],
            reward={TARGET: self.tree["reward"][TARGET], **part.config.model_dump(mode="json")},
            reward_class=part.cls,
            reward_config=part.config,
            seed=top.seed,
            dry_run=top.dry_run,
            token=self.token,
        )


def _token(serve: ServeConfig, where: Any) -> tuple[str | None, list[Problem]]:
    """The token, if one is configured; a server that others can reach must have one."""
    if serve.token_env is None:
        return None, list(_open_to_others(serve, where))
    place, token = where("serve.token_env", serve.token_env), os.environ.get(serve.token_env, "").strip()
    if not token:
        return None, [Problem(place, f"the environment has no {serve.token_env}; `export {serve.token_env}=...` first")]
    if len(token) < LEAST_TOKEN_CHARACTERS or not token.isascii():
        remedy = 'python -c "import secrets; print(secrets.token_urlsafe())" makes a good one'
        return None, [
            Problem(place, f"the token must have at least {LEAST_TOKEN_CHARACTERS} ASCII characters; {remedy}")
        ]
    return token, []


def _open_to_others(serve: ServeConfig, where: Any) -> Iterator[Problem]:
    if not is_loopback(serve.host):
        yield Problem(
            where("serve.host", serve.host),
            "others can reach this address, so requests must carry a token: export RLKIT_TOKEN=... and add "
            "serve.token_env=RLKIT_TOKEN",
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens on `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
