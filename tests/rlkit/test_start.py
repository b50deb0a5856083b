"""A run that is stopped before it trains."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

PROGRAM = """
import contextlib, os, signal, sys, threading, time
from rlkit import run
from rlkit.config.loading import load_config

def reading(*_):  # it goes on when the run is told to end
    while signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)
    threading.Event().wait()

run.ray_session = lambda *_: contextlib.nullcontext()
run.load_prompts = reading
sys.exit(run.run(load_config(["reward=rule", f"run_dir={sys.argv[1]}", "tracking.console=plain"])))
"""


@pytest.mark.slow
def test_ctrl_c_while_the_data_are_read_is_called_so(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.stderr == "rlkit: interrupted (Ctrl-C)\n"
    assert done.returncode == 130
