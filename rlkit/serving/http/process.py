"""A served reward in a process without Ray, which saves 3 s at start-up and 500 MB."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np

import rlkit
from rewards.base import RewardContext
from rlkit.cluster import processes
from rlkit.config.parts import import_part
from rlkit.experience import Group, GroupScores, Message, Prompt, Sample
from rlkit.experience.extras import named_extra
from rlkit.experience.scores import RewardFailed, ScoreReport
from rlkit.models.folder import PREFIX, model_folder

CLOSE_SECONDS = 5.0
"""How long a reward may take to free its resources."""
EDGE_BYTES = 2**20
"""Only this much at both ends of large files is hashed: different weights differ there."""


class WorkerBrokenError(Exception):
    """Raised after the process was killed; the message is the samples' reason."""


class RewardProcess:
    """Hosts a reward; restarted when needed. One call at a time, from one event loop; a call that misses its deadline
    kills the process."""

    def __init__(
        self, target: str, options: Mapping[str, Any], context: RewardContext, startup_timeout: float, timeout: float
    ) -> None:
        """`startup_timeout`, `timeout`: deadlines in seconds."""
        self._arguments = (target, dict(options), context)
        self._startup_timeout, self._timeout = startup_timeout, timeout
        self._process: Any = None
        self._connection: Connection | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reward-process")
        self._busy_since: float | None = None
        self._starts = self._calls = 0
        self._self_test: dict[str, Any] = {}
        self.usable = True
        """False: its last start failed. The next call tries again."""

    @property
    def alive(self) -> bool:
        return self._process is not None and bool(self._process.is_alive())

    def health(self) -> dict[str, Any]:
        now = time.monotonic()
        return {
            "pid": self._process.pid if self.alive else None,
            "alive": self.alive,
            "busy_seconds": None if self._busy_since is None else round(now - self._busy_since, 3),
            "calls": self._calls,
            "restarts": max(0, self._starts - 1),
            "self_test": self._self_test,
        }

    async def start(self) -> None:
        """Load the reward and score a first group. Raises RewardFailed."""
        self.usable = False
        self.kill()
        target = self._arguments[0]
        try:
            self._spawn()
        except OSError as error:  # no file descriptors or no memory left
            raise RewardFailed(f"reward {target} cannot start: no process could be created ({error})") from error
        self._starts += 1
        try:
            answer = await self._exchange(None, self._startup_timeout)
        except TimeoutError:
            raise RewardFailed(f"reward {target} was not ready after {self._startup_timeout:g} s") from None
        except EOFError:
            raise RewardFailed(f"reward {target} cannot start: its process died; see its output") from None
        if isinstance(answer, str):
            self.kill()
            raise RewardFailed(f"reward {target} cannot start: {answer}")
        self._self_test, self.usable = answer, True

    def _spawn(self) -> None:
        ours, theirs = multiprocessing.Pipe()
        try:
            process = processes.spawn(_host, theirs, *self._arguments, name="rlkit-reward")
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self._connection, self._process = ours, process

    async def score(
        self, groups: Sequence[Group], client_seconds: float = math.inf
    ) -> tuple[list[GroupScores], ScoreReport]:
        """Return the groups' scores within `client_seconds`, after which nobody waits for them.

        Raises WorkerBrokenError, or RewardFailed if the process cannot be restarted.
        """
        if not self.alive:
            await self.start()
        pid = self._process.pid
        self._busy_since = time.monotonic()
        try:
            scored, report = await self._exchange(list(groups), min(self._timeout, client_seconds))
        except TimeoutError:
            limit = f"the server's reward.timeout_seconds={self._timeout:g}"
            if client_seconds < self._timeout:
                limit = f"the {client_seconds:.3g} s that were left until its client gave up"
            raise WorkerBrokenError(f"timeout: no answer within {limit}") from None
        except EOFError:
            raise WorkerBrokenError(f"crash: the reward's process {pid} died") from None
        finally:
            self._busy_since = None
        if report.error:
            self.kill()
            raise WorkerBrokenError("exception: " + _last_line(report.error))
        self._calls += 1
        return scored, report

    async def close(self) -> None:
        if self.alive and self._busy_since is None:
            with contextlib.suppress(TimeoutError, EOFError):  # killed below in any case
                await self._exchange("close", CLOSE_SECONDS)
        self.kill()
        self._thread.shutdown(wait=False)

    def kill(self) -> None:
        if self._process is None:
            return
        processes.end([self._process])
        self._process = None

    async def _exchange(self, message: Any, seconds: float) -> Any:
        """Send `message` unless it is None, and receive. Raises TimeoutError or EOFError; the process is then dead."""
        connection, process = self._connection, self._process

        def talk() -> Any:
            assert connection is not None
            if message is not None:
                connection.send(message)
            wait([connection, process.sentinel])
            if not connection.poll():
                raise EOFError
            return connection.recv()

        answer = asyncio.get_running_loop().run_in_executor(self._thread, talk)
        finished = False
        try:
            done, _ = await asyncio.wait({answer}, timeout=seconds)
            if not done:
                raise TimeoutError
            result = answer.result()
            finished = True
            return result
        except OSError as error:
            if isinstance(error, TimeoutError):
                raise
            raise EOFError(str(error)) from error
        finally:
            if not finished:  # also when cancelled: the process is still busy
                self.kill()
                with contextlib.suppress(EOFError, OSError):
                    await answer


def _host(connection: Connection, target: str, options: Mapping[str, Any], context: RewardContext) -> None:
    """Load the reward, score a first group, then answer calls until closed."""
    os.environ.update(
        OMP_NUM_THREADS=str(context.threads),
        OMP_WAIT_POLICY="PASSIVE",
        HF_HUB_OFFLINE="1",
        TOKENIZERS_PARALLELISM="false",
    )
    from rlkit.serving.worker import RewardWorker

    try:
        worker = RewardWorker(target, options, context)
        worker.start()
        began = time.perf_counter()
        group = _first_group(target, options)
        _, report = worker.score(None, [group])
        if report.error and not group.prompt.columns:  # only the columns' names are known: made-up values may fail
            raise RuntimeError(f"its self-test failed: {_last_line(report.error)}")
        connection.send(_self_test(report, time.perf_counter() - began))
    except Exception as error:
        missing = named_extra(error)
        if missing is None:
            traceback.print_exc()
        connection.send(missing or f"{type(error).__name__}: {error}")
        return
    while True:
        try:
            message = connection.recv()
        except EOFError:
            return
        if message == "close":
            worker.close()
            connection.send("closed")
            return
        connection.send(worker.score(None, message))


def _first_group(target: str, options: Mapping[str, Any]) -> Group:
    """Return a group with what the reward needs: a right and a wrong answer to 6 times 7."""
    cls = import_part("reward", target)
    columns = cls.traits(cls.Config(**options)).columns
    prompt = Prompt(
        id="self-test",
        messages=(Message("user", "What is 6 times 7?"),),
        token_ids=(1, 2, 3),
        references=("6 * 7 = 42\n#### 42",),
        answer="42",
        columns=dict.fromkeys(columns, ""),
    )
    return Group("self-test", prompt, tuple(_sample(i, text) for i, text in enumerate(("#### 42", "#### 41"))))


def _self_test(report: ScoreReport, seconds: float) -> dict[str, Any]:
    """Return the result for /health. Invalid scores are no failure: the group may lack what this reward looks for."""
    result: dict[str, Any] = {"seconds": round(seconds, 3), "samples": report.samples, "invalid": dict(report.examples)}
    if report.error:
        result["error"] = _last_line(report.error)
    return result


def _last_line(traceback_text: str) -> str:
    return traceback_text.strip().splitlines()[-1]


def model_version(reward: Mapping[str, Any]) -> str:
    """Return a text that changes with the class, its options, rlkit's version and the content of model folders."""
    digest = hashlib.sha256(rlkit.__version__.encode())
    digest.update(json.dumps(reward, sort_keys=True, default=str).encode())
    for folder in sorted(set(_folders(reward))):
        for file in sorted(path for path in folder.iterdir() if path.is_file()):
            digest.update(f"{file.name} {file.stat().st_size}".encode())
            with file.open("rb") as stream:
                digest.update(stream.read(EDGE_BYTES))
                stream.seek(max(0, file.stat().st_size - EDGE_BYTES))
                digest.update(stream.read(EDGE_BYTES))
    return f"{str(reward['_target_']).rpartition('.')[2]}-{digest.hexdigest()[:12]}"


def _folders(value: Any) -> Iterator[Path]:
    if isinstance(value, Mapping):
        for inner in value.values():
            yield from _folders(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _folders(inner)
    elif isinstance(value, str) and (value.startswith(PREFIX) or "/" in value):
        folder = model_folder(value)
        try:
            is_model = (folder / "config.json").is_file()
        except OSError:  # not a path but a text with a `/`, too long for a file name
            return
        if is_model:
            yield folder


def _sample(index: int, text: str) -> Sample:
    tokens = len(text.split())
    return Sample(index, np.arange(tokens, dtype=np.int32), np.full(tokens, -0.1, np.float32), text, "stop", (0, 0), 0)
