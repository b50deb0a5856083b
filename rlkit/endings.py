"""What a failed or stopped run prints: the end of the log that explains it, the cause, and how to continue."""

from __future__ import annotations

import asyncio
import re
import shlex
import shutil
import sys
from pathlib import Path

from rlkit.checkpoint.folder import is_disk_full, sealed_folders
from rlkit.experience import UserError
from rlkit.tracking.run_folder import RunFolder

LOG_LINES = 12
_ACTORS = {
    "LearnerWorker": ("a rank of the learner", "learner-*.log"),
    "CriticWorker": ("a rank of the critic", "critic-*.log"),
    "RolloutWorker": ("a rollout worker", "rollout-*.log"),
    "RewardWorker": ("a reward worker", "reward-*.log"),
}
"""Class name of an actor -> what it is, and its log files."""


def ending(error: BaseException, folder: RunFolder) -> str:
    """Return a message on what ended a run; its last line says how to continue if anything was saved."""
    lines = [f"rlkit: {cause(error, folder)}"]
    saved = sealed_folders(folder.checkpoints)
    if not isinstance(error, UserError | KeyboardInterrupt | asyncio.CancelledError):
        lines.append(f"Logs: {folder.logs}/")
    if saved:
        step, again = int(saved[0].name[5:]), f"run_dir={shlex.quote(str(folder.path))} resume=auto"
        lines.append(f"To continue after step {step}, use the same command with {again}")
    return _log_tail(error, folder.logs) + "\n".join(lines)


def cause(error: BaseException, folder: RunFolder) -> str:
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted (Ctrl-C)"
    if isinstance(error, asyncio.CancelledError):
        return "ended by SIGTERM"
    if _actor_died(error):
        what, _ = _actor(error)
        process = re.search(r"pid: (\d+)", str(error))
        who = f"{what} (process {process[1]})" if process else what
        return f"{who} died: killed from outside, killed by the kernel for lack of memory (dmesg says so), or crashed"
    if is_disk_full(error):
        name = getattr(error, "filename", None) or folder.path
        free = shutil.disk_usage(folder.path).free / 2**20
        return f"the disk is full: {name} cannot be written, {free:,.1f} MiB are free; make room there"
    return f"{type(error).__name__}: {error}"


def _actor_died(error: BaseException) -> bool:
    if "ray" not in sys.modules:  # Ray is not running, and may not be installed
        return False
    from ray.exceptions import RayActorError

    return isinstance(error, RayActorError)


def _actor(error: BaseException) -> tuple[str, str]:
    name = re.search(r"class_name: (\w+)", str(error))
    return _ACTORS.get(name[1] if name else "", ("a process of the run", "*.log"))


def _log_tail(error: BaseException, logs: Path) -> str:
    """Return the last log lines of all actors of the dead actor's kind; an empty text if no actor died."""
    if not _actor_died(error):
        return ""
    files = [file for file in sorted(logs.glob(_actor(error)[1])) if file.name not in ("driver.log", "console.log")]
    return "".join(
        f"--- end of {file.name} ---\n" + "\n".join(file.read_text(errors="replace").splitlines()[-LOG_LINES:]) + "\n"
        for file in files
    )
