"""Ranks of one training as processes on this machine; none outlives the others.

If a rank dies, the others are ended. If one hangs, the others wait in a collective operation, whose timeout ends all.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any, NoReturn

from rlkit.cluster.processes import end, free_port, spawn
from rlkit.experience import UserError

FAILED = 1
INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM
LOOK_SECONDS = 1.0
"""Interval at which the parent checks the time."""
END_SECONDS = 10.0
"""Time for an orderly end, after which ranks are killed."""

Work = Callable[..., int]
"""(rank, port, *arguments) -> exit code. Must be picklable by name."""


class Terminated(BaseException):
    """Raised on SIGTERM; like KeyboardInterrupt, it is not caught by `except Exception`."""


class RankHangsError(UserError, RuntimeError): ...


def run_ranks(ranks: int, seconds: float, limit: str, work: Work, *arguments: Any) -> int:
    """Call `work` for every rank, in this process if there is one, else in child processes; return the exit code.

    `seconds` (from the key `limit`): how long a rank may keep the others waiting.
    """
    port = free_port()
    if ranks == 1:
        return work(0, port, *arguments)
    processes: list[BaseProcess] = []
    with raises_terminated():
        try:
            for rank in range(ranks):
                processes.append(spawn(_rank_process, rank, port, work, arguments))
            return _wait_for(processes, seconds, limit)
        except KeyboardInterrupt:
            print("rlkit: interrupted", file=sys.stderr)
            return INTERRUPTED
        except Terminated:
            print("rlkit: ended by SIGTERM", file=sys.stderr)
            return TERMINATED
        finally:
            end(processes, END_SECONDS)


def join_ranks(rank: int, ranks: int, port: int, device: str, threads: int, seed: int, seconds: float) -> None:
    """Select this rank's GPU, seed torch and join the other ranks. Imports torch and DeepSpeed."""
    if device == "cuda" and ranks > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(str(i) for i in range(ranks)))
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[rank]
    import torch
    import torch.distributed as dist

    from rlkit.learner.engine import init_process_group

    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    if dist.is_initialized():  # tests run several trainings in one process
        return
    init_process_group(rank, ranks, "127.0.0.1", port, device, seconds)


@contextmanager
def naming_a_hang(rank: int, ranks: int, seconds: float, limit: str) -> Iterator[None]:
    """Turn the timeout of a collective operation into RankHangsError. (NCCL ends the process instead.)"""
    try:
        yield
    except RuntimeError as error:
        if ranks == 1 or "timed out" not in str(error).lower():
            raise
        raise RankHangsError(
            f"rank {rank} waited more than {limit}={seconds:g} s for another rank, which hangs or is far behind: "
            f"{str(error).splitlines()[0]}"
        ) from error


@contextmanager
def raises_terminated() -> Iterator[None]:
    """Raise Terminated in the body on SIGTERM."""
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


def _rank_process(rank: int, port: int, work: Work, arguments: Sequence[Any]) -> NoReturn:
    code = work(rank, port, *arguments)
    if code:  # exits at once: in an orderly end, threads of a broken group would abort the process
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(0)


def _wait_for(processes: Sequence[BaseProcess], seconds: float, limit: str) -> int:
    """Wait for the processes. Return 0 when all have ended well, or the exit code of one that has not."""
    running = {process.sentinel: rank for rank, process in enumerate(processes)}
    first_end: float | None = None
    while running:
        for sentinel in wait(list(running), timeout=LOOK_SECONDS):
            rank = running.pop(sentinel)  # type: ignore[arg-type]
            processes[rank].join()
            code = processes[rank].exitcode or 0
            if code < 0:
                print(
                    f"rlkit: rank {rank} was ended by {signal.Signals(-code).name}; ending the others", file=sys.stderr
                )
                return FAILED
            if code:
                return code
            first_end = first_end or time.monotonic()
        if first_end is not None and running and time.monotonic() - first_end > seconds:
            late = ", ".join(str(rank) for rank in running.values())
            print(
                f"rlkit: rank {late} has not ended {seconds:g} s ({limit}) after the first one did; ending it",
                file=sys.stderr,
            )
            return FAILED
    return 0
