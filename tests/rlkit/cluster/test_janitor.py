"""What a run leaves is cleared away, however its driver ended."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from rlkit.cluster.janitor import ORPHANS_SECONDS

DRIVER = """
import os, subprocess, sys
from pathlib import Path
from rlkit.cluster.janitor import TOKEN, janitor

folder = Path(sys.argv[1])
(folder / "run").mkdir()
with janitor(str(folder), folder / "run", folder / "logs"):
    left = subprocess.Popen(["sleep", "500"], env={TOKEN: str(folder)}, stdout=subprocess.DEVNULL)
    print(left.pid, flush=True)
    sys.stdin.readline()
print("orderly", flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("how", [pytest.param("killed", marks=pytest.mark.slow), "orderly"])
def test_what_outlives_its_driver_is_ended(how: str, tmp_path: Path) -> None:
    """Not while an orderly driver lives: it may take its time with Ray."""
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert driver.stdin is not None and driver.stdout is not None
    left = psutil.Process(int(driver.stdout.readline()))
    if how == "killed":
        driver.kill()
    else:
        print(file=driver.stdin, flush=True)
        assert driver.stdout.readline() == "orderly\n"
        time.sleep(ORPHANS_SECONDS + 1)
        assert left.is_running()
    driver.communicate("\n" * (how == "orderly"))
    psutil.wait_procs([left], timeout=2 * ORPHANS_SECONDS)
    assert not left.is_running()
    end = time.monotonic() + 10
    while (tmp_path / "run").exists():
        assert time.monotonic() < end
        time.sleep(0.1)
