"""A reward server: its configuration (the reward's and the section `serve`), start and end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import uvicorn
from omegaconf import DictConfig, OmegaConf
from pydantic import Field
from rich.console import Console

import rlkit
from rewards.base import Reward, RewardConfig, RewardContext, TrainableReward
from rlkit.config.access import is_loopback, token_problem
from rlkit.config.help import print_section
from rlkit.config.loading import Loading
from rlkit.config.messages import ConfigError, ConfigIssue, all_fields
from rlkit.config.parts import CONTRACTS, TARGET, conf_dir
from rlkit.experience.section import Deadline, Section, Seed
from rlkit.experience.wire import SCHEMA_VERSION, Health, Traits
from rlkit.serving.http.app import make_app
from rlkit.serving.http.process import RewardProcess, model_version
from rlkit.serving.http.queue import BatchLimits, ScoringQueue, ServerMetrics

USED = {
    "reward": "the reward to serve, with its fields (reward.workers: how many processes score in parallel)",
    "serve": "the server; its keys are listed below",
    "seed": "passed to the reward",
    "dry_run": "validate only",
}
KEEP_ALIVE_SECONDS = 60


class ServeConfig(Section):
    """The server."""

    host: str = "127.0.0.1"
    """Address to listen on. Any address other than this machine's loopback needs `serve.token_env`."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port to listen on; 0 picks a free one and prints it."""
    token_env: str | None = None
    """Environment variable with the token that every request must carry (Authorization: Bearer ...)."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device of the reward."""
    threads: int = Field(default=2, ge=1)
    """CPU threads of each reward process."""
    max_batch_samples: int = Field(default=256, ge=1)
    """Waiting requests are scored together up to this many samples; also the limit of one request."""
    max_batch_tokens: int = Field(default=262144, ge=1)
    """Waiting requests are scored together up to this many tokens; a single larger request is scored alone."""
    max_queued_samples: int = Field(default=4096, ge=1)
    """Number of samples that may wait; a request beyond that is answered 429 and should be retried."""
    max_body_mib: float = Field(default=64.0, gt=0)
    """Larger requests are answered 413."""
    max_connections: int = Field(default=128, ge=1)
    """Concurrent requests; further ones are answered 503."""
    startup_timeout_seconds: Deadline = 600.0
    """Time to load the reward and score a first group, also when its process is replaced."""
    end_seconds: float = Field(default=10.0, gt=0)
    """Time for open requests to finish after Ctrl-C or SIGTERM."""


@dataclass(frozen=True)
class ResolvedServe:
    serve: ServeConfig
    reward: dict[str, Any]
    """`_target_` and all fields, with defaults."""
    reward_class: type[Reward]
    reward_config: RewardConfig
    seed: int
    dry_run: bool
    token: str | None

    @property
    def learns(self) -> bool:
        """Whether the reward would learn in a run; a served reward does not change."""
        cls = self.reward_class
        return issubclass(cls, TrainableReward) and cls.traits(self.reward_config).update_when != "none"


class _ServeRun(Section):
    seed: Seed = 0
    dry_run: bool = False
    serve: ServeConfig = ServeConfig()
    reward: dict[str, Any]


def print_help(usage: str) -> None:
    print(usage)
    for key, text in USED.items():
        print(f"  {key:<10}{text}")
    print("  `python -m rlkit.train --help` lists all rewards with their keys.")
    print_section(Console(), "serve", ServeConfig.__doc__ or "", all_fields(ServeConfig, "serve."))


def load_serve_config(arguments: Sequence[str]) -> ResolvedServe:
    """Resolve Hydra overrides. Raises ConfigError with every problem."""
    loading = _ServeLoading(arguments)
    loading.validate()
    loading.check()
    return loading.result()


class _ServeLoading(Loading):
    """Loads the reward as in a run, from the same option files, but no other component or section."""

    def __init__(self, arguments: Sequence[str]) -> None:
        used: list[str] = []
        refused: list[str] = []
        for argument in arguments:
            top = argument.lstrip("+~").partition("=")[0].partition(".")[0]
            (used if top in USED else refused).append(argument)
        contracts = {"reward": CONTRACTS["reward"]}
        super().__init__(used, None, folder=conf_dir(), schema=_ServeRun, contracts=contracts)
        self.problems += [
            ConfigIssue(argument, f"has no effect in rlkit.serve; keys that do: {', '.join(USED)}")
            for argument in refused
        ]
        if not {"reward", "reward._target_"} & set(self.overrides.typed):
            self.problems.append(
                ConfigIssue("reward", "choose what to serve: reward=rule, or reward._target_=my_module.MyReward")
            )
        self.token: str | None = None

    def _plain(self, composed: DictConfig) -> dict[str, Any]:
        kept = [name for name in composed if name == "hydra" or name in _ServeRun.model_fields]
        return super()._plain(OmegaConf.masked_copy(composed, kept))

    def _run_config(self, known: Sequence[str]) -> None:
        section = self.tree.get("serve", {})
        if isinstance(section, dict):
            self.available["serve"] = self._section(ServeConfig, section, "serve.", known)
        else:
            message = "is a section; set its keys one by one, like serve.port=8000"
            self.problems.append(ConfigIssue(self.sources.where("serve", section), message))
        plain = {key: value for key, value in self.tree.items() if key in ("seed", "dry_run")}
        self.available["top"] = self._section(_ServeRun, {**plain, "reward": {}}, "", known)

    def check(self) -> None:
        if "reward" in self.parts:
            part = self.parts["reward"]
            where = self.sources.where("reward", None)
            self.problems += [ConfigIssue(where, message) for message in part.cls.check(part.config)]
            if part.cls.traits(part.config).environment:
                message = (
                    f"{part.cls.__name__} judges episodes as they were played, and these are not sent; use it in the "
                    "run"
                )
                self.problems.append(ConfigIssue(where, message))
        serve = self.available.get("serve")
        if isinstance(serve, ServeConfig):
            self.token, problems = _token(serve, self.sources.where)
            self.problems += problems

    def result(self) -> ResolvedServe:
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


def _token(serve: ServeConfig, where: Callable[[str, Any], str]) -> tuple[str | None, list[ConfigIssue]]:
    """Return the configured token; a server that others can reach must have one."""
    variable = serve.token_env
    if variable is None:
        if is_loopback(serve.host):
            return None, []
        message = (
            "others can reach this address, so requests must carry a token: export RLKIT_TOKEN=... and add "
            "serve.token_env=RLKIT_TOKEN"
        )
        return None, [ConfigIssue(where("serve.host", serve.host), message)]
    key, token = where("serve.token_env", variable), os.environ.get(variable, "").strip()
    if not token:
        return None, [ConfigIssue(key, f"the environment has no {variable}; `export {variable}=...` first")]
    problem = token_problem(token)
    return (token, []) if problem is None else (None, [ConfigIssue(key, problem)])


def serve(resolved: ResolvedServe) -> None:
    """Load the reward, serve until Ctrl-C or SIGTERM, end everything.

    Raises ConfigError if the port is taken, RewardFailed if the reward cannot start.
    """
    with _listening(resolved.serve) as listener:
        asyncio.run(_serve(resolved, listener))


@contextlib.contextmanager
def _listening(serve: ServeConfig) -> Iterator[socket.socket]:
    """Bind the port before the reward is loaded; connections are accepted later. Raises ConfigError."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(serve.host, serve.port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        where = f"serve.host={serve.host} serve.port={serve.port}"
        raise ConfigError(
            [ConfigIssue(where, f"cannot listen there: {error.strerror}; choose another port")]
        ) from error
    with listener:
        yield listener


async def _serve(resolved: ResolvedServe, listener: socket.socket) -> None:
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
    name = resolved.reward[TARGET]
    if resolved.learns:
        print(
            f"rlkit: {name} learns only within a run; when served, it stays as it is and only scores", file=sys.stderr
        )
    print(f"loading {name}", flush=True)
    queue, description = _queue(resolved), _description(resolved)
    server = _Server(
        uvicorn.Config(
            make_app(queue, description, resolved.token),
            log_level="warning",
            access_log=False,
            server_header=False,
            lifespan="off",
            limit_concurrency=resolved.serve.max_connections,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=max(1, round(resolved.serve.end_seconds)),
        )
    )
    ending = _end_on_signals(server)
    try:
        starting = asyncio.ensure_future(queue.start())
        await asyncio.wait({starting, ending}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()  # its processes are killed
            await asyncio.wait({starting})
        else:
            starting.result()
            listener.listen()  # a client that reads the next line may connect at once, before uvicorn listens
            print(f"serving {name} ({description.model_version}) on {_address(listener)}", flush=True)
            await server.serve(sockets=[listener])
    finally:
        await queue.close()
    print("ended", flush=True)


def _queue(resolved: ResolvedServe) -> ScoringQueue:
    serve, config = resolved.serve, resolved.reward_config
    context = RewardContext(
        device=serve.device, gpus=float(serve.device == "cuda"), seed=resolved.seed, threads=serve.threads
    )
    target, options = resolved.reward[TARGET], {k: v for k, v in resolved.reward.items() if k != TARGET}
    workers = [
        RewardProcess(target, options, context, serve.startup_timeout_seconds, config.timeout_seconds)
        for _ in range(config.workers)
    ]
    limits = BatchLimits(serve.max_batch_samples, serve.max_batch_tokens, serve.max_queued_samples)
    return ScoringQueue(workers, limits, ServerMetrics())


def _description(resolved: ResolvedServe) -> Health:
    traits = resolved.reward_class.traits(resolved.reward_config)
    return Health(
        status="down",
        schema_version=SCHEMA_VERSION,
        rlkit_version=rlkit.__version__,
        reward=resolved.reward[TARGET],
        model_version=model_version(resolved.reward),
        traits=Traits.model_validate(traits, strict=False, from_attributes=True),
        trainable=resolved.learns,
        max_request_samples=resolved.serve.max_batch_samples,
        max_body_bytes=int(resolved.serve.max_body_mib * 2**20),
        call_timeout_seconds=resolved.reward_config.timeout_seconds,
        workers=[],
    )


class _Server(uvicorn.Server):
    """Leaves signals to this module, also while the reward loads; uvicorn would raise them again at its end."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _end_on_signals(server: _Server) -> asyncio.Future[None]:
    """Return a future set at the first signal, after which open requests may finish; a second Ctrl-C ends them."""
    loop = asyncio.get_running_loop()
    signalled: asyncio.Future[None] = loop.create_future()

    def end() -> None:
        server.force_exit = server.should_exit
        server.should_exit = True
        if not signalled.done():
            signalled.set_result(None)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, end)
    return signalled


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
