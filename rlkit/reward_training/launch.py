"""One reward training from a valid configuration to its summary: ranks, run folder, exit codes."""

from __future__ import annotations

import sys
import time
import traceback
from typing import Any

from rlkit.config.command import print_error
from rlkit.experience import UserError
from rlkit.reward_training.base import TrainingContext
from rlkit.reward_training.load import ResolvedRewardTraining
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


def launch(resolved: ResolvedRewardTraining) -> int:
    """Run the configured stage. Returns 0, 1 after an error explained on the screen, 130 after Ctrl-C, 143 after
    SIGTERM."""
    return run_ranks(resolved.reward.ranks, resolved.config.rank_timeout_seconds, LIMIT, run_rank, resolved)


def run_rank(rank: int, port: int, resolved: ResolvedRewardTraining) -> int:
    """One rank from start to end; rank 0 has the run folder. Returns the exit code."""
    seconds, ranks = resolved.config.rank_timeout_seconds, resolved.reward.ranks
    try:
        with raises_terminated(), naming_a_hang(rank, ranks, seconds, LIMIT):
            if rank:
                _run(rank, resolved, SilentReport(), port)
                return 0
            folder = RunFolder(resolved.config.run_dir)
            folder.write_config(resolved.text())
            with RunReport(folder) as report:
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
            print(f"What libraries said is in {logs}/driver.log.", file=sys.stderr)
        elif rank == 0 or isinstance(error, RankHangsError):
            print_error(error)
        return FAILED


def _run(rank: int, resolved: ResolvedRewardTraining, report: Any, port: int) -> dict[str, Any]:
    """Join the ranks and run the stage."""
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
    if ranks == 1:  # else the parent of the ranks says it
        print(f"rlkit: {how}", file=sys.stderr)
    return code
