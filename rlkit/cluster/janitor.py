"""A process that outlives a driver with its own Ray and removes what is left, however the driver ended.

It removes Ray's session folder, temporary files, and semaphores and shared memory of killed processes. Standard library
only: `janitor.py TOKEN FOLDER LOGS`; its standard input ends with the driver.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

TOKEN = "RLKIT_RUN_TOKEN"
"""Environment variable of every process of a run; semaphores carry its value in their names."""
SECONDS = 300.0
"""Deadline for the run's processes to end; after it nothing is removed. More than twice END_SECONDS of rlkit/run.py."""
ORPHANS_SECONDS = 5.0
"""Time after which processes that outlive their driver are killed. Ray's agents would call a dead Ray for a minute, and
an actor that Ray was ending may remain."""
ORDERLY, FAILED = b"orderly", b"failed"
_LEFT = re.compile(r"sem\.mp-|psm_|torch_|nccl-")
"""Prefixes of the semaphores and shared memory of Python, torch and NCCL."""
_MAPPED = re.compile(r"^(?:\S+ +){4}(\d+) +/dev/shm/", re.MULTILINE)
"""Inode of a mapped file. (The name listed there is the one at creation, which a semaphore loses.)"""


@contextlib.contextmanager
def janitor(token: str, folder: Path, logs: Path) -> Iterator[None]:
    """Remove `folder` and shared memory after the body, or when this process dies.

    Ray's own logs are copied to `logs` after a kill, or an error unless it has the attribute `orderly`.
    """
    command = [sys.executable, "-I", "-S", __file__, token, str(folder), str(logs.absolute())]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, env={}, start_new_session=True)
    assert process.stdin is not None
    try:
        yield
    except Exception as error:
        ending = ORDERLY if getattr(error, "orderly", False) else FAILED
        raise
    except BaseException:  # Ctrl-C, SIGTERM
        ending = ORDERLY
        raise
    else:
        ending = ORDERLY
    finally:
        with contextlib.suppress(BrokenPipeError):  # the janitor was killed
            process.stdin.write(ending)
            process.stdin.close()
        # Not waited for: the janitor ends after the last process of the run, a few seconds later.


def _clear_away(token: str, folder: Path, logs: Path) -> None:
    driver = os.getppid()
    ending = sys.stdin.buffer.read()  # empty: the driver was killed
    began = time.monotonic()
    alone: float | None = None
    shared: set[Path] = set()
    while (left := _processes(token)) and (now := time.monotonic()) < began + SECONDS:
        shared |= _shared_by(left)
        if alone is None and (not ending or os.getppid() != driver):  # the driver may still be ending Ray
            alone = now
        if alone is not None and now > alone + ORPHANS_SECONDS:
            _kill(left)
        time.sleep(0.2)
    if left:
        sys.exit(f"rlkit: {folder} is kept, because processes of the run are still alive after {SECONDS:g} s: {left}")
    for file in (*Path("/dev/shm").glob(f"sem.rlkit-{token}-*"), *shared):
        file.unlink(missing_ok=True)
    if ending != ORDERLY and logs.parent.is_dir():
        for session in folder.glob("ray/session_*_*/logs"):
            shutil.copytree(session, logs, symlinks=True, dirs_exist_ok=True)
    with contextlib.suppress(FileNotFoundError):  # already removed
        shutil.rmtree(folder)


def end_processes(token: str) -> None:
    """Kill a run's processes, except this one, and wait for their end."""
    ends = time.monotonic() + ORPHANS_SECONDS
    while (left := _processes(token)) and time.monotonic() < ends:
        _kill(left)
        time.sleep(0.1)


def _kill(processes: list[int]) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(process, signal.SIGKILL)


def _processes(token: str) -> list[int]:
    mark, processes = f"{TOKEN}={token}".encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            alive = mark in (folder / "environ").read_bytes().split(b"\0")
        except OSError:  # it has ended, or belongs to another user
            continue
        if alive and int(folder.name) != os.getpid():
            processes.append(int(folder.name))
    return processes


def _shared_by(processes: list[int]) -> set[Path]:
    """Return the files in /dev/shm that these processes would leave behind if killed now."""
    mapped: set[int] = set()
    for process in processes:
        with contextlib.suppress(OSError):  # it has ended
            mapped.update(map(int, _MAPPED.findall(Path(f"/proc/{process}/maps").read_text())))
    return {Path(file.path) for file in os.scandir("/dev/shm") if _LEFT.match(file.name) and file.inode() in mapped}


if __name__ == "__main__":
    _clear_away(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
