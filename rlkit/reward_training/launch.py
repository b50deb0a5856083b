"""One reward training from a valid configuration to its summary: ranks, run folder, exit codes."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from rlkit.data.base import DataError
from rlkit.reward_training.base import TrainingContext
from rlkit.reward_training.load import ResolvedRewardTraining
from rlkit.reward_training.report import RunReport, SilentReport
from rlkit.tracking.run_folder import RunFolder, RunFolderError

FAILED = 1
INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM


class Terminated(BaseException):
    """SIGTERM arrived; like KeyboardInterrupt it passes through everything."""


def launch(resolved: ResolvedRewardTraining) -> int:
    """Run the configured stage. Returns 0, 1 after an error explained on the screen, 130 after Ctrl-C, 143 after
    SIGTERM."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    return run_rank(0, resolved, port) if resolved.reward.ranks == 1 else _spawn(resolved, port)


def run_rank(rank: int, resolved: ResolvedRewardTraining, port: int) -> int:
    """One rank from start to end; rank 0 has the run folder. Returns the exit code."""
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        if rank:
            _run(rank, resolved, SilentReport(), port)
            return 0
        folder = RunFolder(resolved.config.run_dir)
        folder.write_config(resolved.text())
        with RunReport(folder) as report:
            report.finish(_run(rank, resolved, report, port))
        return 0
    except KeyboardInterrupt:
        return _ended(rank, "interrupted", INTERRUPTED)
    except Terminated:
        return _ended(rank, "ended by SIGTERM", TERMINATED)
    except Exception as error:
        if rank == 0 or not _is_explained(error):
            print(_explain(error, resolved.config.run_dir / "logs"), file=sys.stderr)
        return FAILED
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(rank: int, resolved: ResolvedRewardTraining, report: Any, port: int) -> dict[str, Any]:
    """Join the ranks and run the stage."""
    began, config, reward = time.monotonic(), resolved.config, resolved.reward
    if config.device == "cuda" and reward.ranks > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(str(i) for i in range(reward.ranks)))
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[rank]
    report.phase("loading libraries")
    import torch
    import torch.distributed as dist

    from rlkit.learner.engine import init_process_group

    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    if not dist.is_initialized():  # the tests' process runs several trainings
        init_process_group(rank, reward.ranks, "127.0.0.1", port, config.device)
    context = TrainingContext(config.run_dir, config.device, config.seed, rank, config.stage)
    backend = resolved.backend(resolved.reward, resolved.data, context)
    summary = backend.run(report)
    return {**summary, "wall_seconds": round(time.monotonic() - began, 3)}


def _spawn(resolved: ResolvedRewardTraining, port: int) -> int:
    """One process per rank; all of them end when one fails, or with this process."""
    from torch.multiprocessing.spawn import ProcessExitedException, spawn

    context = spawn(_rank_process, args=(resolved, port), nprocs=resolved.reward.ranks, join=False)
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        while not context.join(timeout=5):
            pass
        return 0
    except ProcessExitedException as error:
        return int(error.exit_code)
    except KeyboardInterrupt:
        return _ended(0, "interrupted", INTERRUPTED)
    except Terminated:
        return _ended(0, "ended by SIGTERM", TERMINATED)
    finally:
        signal.signal(signal.SIGTERM, before)
        for process in context.processes:
            process.terminate()
        for process in context.processes:
            process.join(timeout=10)
            process.kill()


def _rank_process(rank: int, resolved: ResolvedRewardTraining, port: int) -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the parent ends its ranks
    sys.exit(run_rank(rank, resolved, port))


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


def _ended(rank: int, how: str, code: int) -> int:
    if rank == 0:
        print(f"rlkit: {how}", file=sys.stderr)
    return code


def _is_explained(error: Exception) -> bool:
    """Whether the message is all a user needs."""
    expected: list[type[Exception]] = [DataError, RunFolderError]
    if "torch" in sys.modules:
        from rlkit.models.policy import ModelLoadError
        from rlkit.supervised import StepSkipped

        expected += [ModelLoadError, StepSkipped]
    return isinstance(error, tuple(expected))


def _explain(error: Exception, logs: Path) -> str:
    if _is_explained(error):
        return f"rlkit: {error}"
    trace = "".join(traceback.format_exception(error))
    return f"{trace}rlkit: {type(error).__name__}: {error}\nWhat libraries said is in {logs}/driver.log."
