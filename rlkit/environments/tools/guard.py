"""Runs a command that does not outlive the process that started it: `guard.py PARENT COMMAND...`. Standard library
only.

It leads a process group, and kills all of it when the command or the parent ends, however that was killed.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys


def main(parent: int, command: list[str]) -> None:
    watched = os.pidfd_open(parent)
    if os.getppid() != parent:  # it has ended already
        return
    try:
        child = subprocess.Popen(command)
    except OSError as error:
        sys.exit(f"{command[0]} cannot be started: {error}")
    select.select([watched, os.pidfd_open(child.pid)], [], [])
    if child.poll() is not None:
        print(f"{command[0]} ended with exit code {child.returncode}", file=sys.stderr, flush=True)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
