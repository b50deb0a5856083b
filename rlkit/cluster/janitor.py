"""Runs beside a driver that started a Ray of its own and clears away what is left of it, however the driver ended.

Ray leaves its session folder in any case; killed processes leave semaphores in /dev/shm. Started by its path, with
Python's standard library alone: `janitor.py TOKEN SESSION LOGS`. Its standard input ends with the driver.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

TOKEN = "RLKIT_RUN_TOKEN"
"""Variable in the environment of every process of a run; semaphores are named after its value, too."""
SECONDS = 60.0
"""How long the run's processes may take to be gone (Ray's reaper ends them); after that nothing is removed."""
ORDERLY = b"orderly"


@contextlib.contextmanager
def janitor(token: str, session: str, logs: Path) -> Iterator[None]:
    """Clears away after the body or the death of this process; Ray's own logs go to `logs` after an error or a kill."""
    command = [sys.executable, "-I", "-S", __file__, token, session, str(logs.absolute())]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, env={}, start_new_session=True)
    assert process.stdin is not None
    try:
        yield
    except Exception:
        said = b""
        raise
    except BaseException:  # Ctrl-C, SIGTERM
        said = ORDERLY
        raise
    else:
        said = ORDERLY
    finally:
        with contextlib.suppress(BrokenPipeError):  # somebody killed it
            process.stdin.write(said)
            process.stdin.close()
        # Not waited for: it ends after the last process of the run, a few seconds later.


def _clear_away(token: str, session: Path, logs: Path) -> None:
    orderly = sys.stdin.buffer.read() == ORDERLY
    end = time.monotonic() + SECONDS
    while (left := _processes(token)) and time.monotonic() < end:
        time.sleep(0.2)
    if left:
        sys.exit(f"rlkit: {session} stays, because processes of the run are alive after {SECONDS:g} s: {left}")
    for semaphore in Path("/dev/shm").glob(f"sem.rlkit-{token}-*"):
        semaphore.unlink(missing_ok=True)
    if not orderly and logs.parent.is_dir() and (session / "logs").is_dir():
        shutil.copytree(session / "logs", logs, symlinks=True, dirs_exist_ok=True)
    latest = session.parent / "session_latest"
    if latest.is_symlink() and latest.readlink() == session:
        latest.unlink()
    shutil.rmtree(session)


def _processes(token: str) -> list[int]:
    """Processes of the run on this machine."""
    mark, found = f"{TOKEN}={token}".encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            alive = mark in (folder / "environ").read_bytes().split(b"\0")
        except OSError:  # it has ended, or is somebody else's
            continue
        if alive and int(folder.name) != os.getpid():
            found.append(int(folder.name))
    return found


if __name__ == "__main__":
    _clear_away(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
