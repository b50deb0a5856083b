"""Ray's start, on a machine that is too busy for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

pytestmark = [pytest.mark.ray, pytest.mark.slow]  # Ray itself waits 30 s

PROGRAM = """
import sys, threading, time
from pathlib import Path
import psutil
from rlkit.cluster.ray_session import ray_session
from rlkit.config.schema import ClusterConfig

stopped = []

def stop(times):
    while len(stopped) < times:
        for child in psutil.Process().children(recursive=True):
            if child.pid not in stopped and child.name() == "raylet":
                child.suspend()
                stopped.append(child.pid)
        time.sleep(0.001)

threading.Thread(target=stop, args=(int(sys.argv[1]),), daemon=True).start()
with ray_session(ClusterConfig(), Path(sys.argv[2]), 2**27):
    import ray
    print("answer", ray.get(ray.remote(lambda: 42).remote(), timeout=60))
    print("left of the first", [pid for pid in stopped if psutil.pid_exists(pid)
          and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE])
"""


def started(tmp_path: Path, stopped: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, str(stopped), str(tmp_path / "logs")]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)


def test_a_node_that_does_not_come_up_in_time_is_started_once_more(tmp_path: Path) -> None:
    done = started(tmp_path, 1)
    assert done.stdout.split("\n")[:2] == ["answer 42", "left of the first []"], done.stderr


def test_one_that_never_does_is_said(tmp_path: Path) -> None:
    assert "UserError: Ray timed out twice while starting: this machine is very busy" in started(tmp_path, 2).stderr
