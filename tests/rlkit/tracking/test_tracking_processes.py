"""The console and the logs of whole processes, in pipes and in a real terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from paths import ROOT
from ray_fixture import HANGS_SECONDS

SCRIPT = """
import logging, os, sys, time, warnings
sys.path.insert(0, {root!r})
from rlkit.config.tracking import TrackingConfig
from rlkit.tracking import RunFolder, Tracker
mode, folder, ending = sys.argv[1:]
with Tracker(TrackingConfig(console=mode, tensorboard=False), RunFolder(folder), total_steps=3) as tracker:
    tracker.phase("starting Ray")
    time.sleep(0.7 if sys.stdin.isatty() else 0)  # longer than a live view's redraw
    print("noise on stdout", flush=True)
    os.system("echo noise of a child >&2")
    warnings.warn("noise of warnings")
    logging.getLogger("vllm").error("noise of logging")
    logging.getLogger("rlkit.serving").warning("a reward is slow")
    tracker.evaluation(0, "accuracy/heldout", {{"accuracy/heldout": 0.25}})
    for step in (1, 2, 3):
        with tracker.timed("generate"):
            time.sleep(0.01)
        if step == 2 and ending == "error":
            raise RuntimeError("the rollout worker died")
        if step == 2 and ending == "wait":
            tracker.message("waiting now")
            time.sleep(60)
        tracker.step(step, {{"reward/mean": step / 4, "length/mean": 9.5}})
    tracker.evaluation(3, "accuracy/heldout", {{"accuracy/heldout": 0.75}})
    tracker.finish({{"accuracy_before": 0.25, "accuracy_after": 0.75, "steps": 3}})
print("after the run")
"""


def script(tmp_path: Path, mode: str, ending: str) -> list[str]:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.format(root=str(ROOT)))
    return [sys.executable, str(path), mode, str(tmp_path / "run"), ending]


def in_terminal(command: list[str], until: str = "", **environment: str) -> tuple[int, str]:
    """Run in a pseudo-terminal of 100 x 30; SIGINT once `until` was printed. Returns exit code and all output."""
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    env = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "LINES", "FORCE_COLOR")}
    env |= {"TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8", **environment}
    process = subprocess.Popen(command, stdin=child, stdout=child, stderr=child, env=env, start_new_session=True)
    os.close(child)
    output, deadline, interrupted = b"", time.monotonic() + HANGS_SECONDS, False
    try:
        while time.monotonic() < deadline:
            if not select.select([parent], [], [], 0.2)[0]:
                continue
            try:
                chunk = os.read(parent, 65536)
            except OSError:  # the other end was closed
                break
            output += chunk
            if until and not interrupted and until in output.decode(errors="replace"):
                process.send_signal(signal.SIGINT)
                interrupted = True
        return process.wait(timeout=HANGS_SECONDS), output.decode()
    finally:
        process.kill()
        process.wait()
        os.close(parent)


def assert_terminal_is_sane(output: str) -> None:
    assert output.count("\x1b[?25l") >= 1, "the cursor was never hidden: was this live?"
    assert output.rfind("\x1b[?25h") > output.rfind("\x1b[?25l"), "the cursor was left hidden"


@pytest.mark.parametrize("mode", ["plain", "auto"])
def test_plain_process(tmp_path: Path, mode: str) -> None:
    done = subprocess.run(script(tmp_path, mode, "end"), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "noise" not in done.stdout + done.stderr
    assert "\x1b" not in done.stdout
    steps = [line for line in done.stdout.splitlines() if line.startswith("step ")]
    assert len(steps) == 3
    assert len({line.index("reward") for line in steps}) == 1
    for text in ("starting Ray", "warning: a reward is slow", "25.0% → 75.0% (+50.0 points)", "after the run"):
        assert text in done.stdout
    log = (tmp_path / "run" / "logs" / "driver.log").read_text()
    for noise in ("stdout", "a child", "warnings", "logging"):
        assert f"noise o{'n' if noise == 'stdout' else 'f'} {noise}" in log
    transcript = (tmp_path / "run" / "logs" / "console.log").read_text()
    assert all(line in transcript for line in steps)
    assert "held-out accuracy  75.0% after step 3" in transcript


def test_off_process_is_silent_but_keeps_its_transcript(tmp_path: Path) -> None:
    done = subprocess.run(script(tmp_path, "off", "end"), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "after the run\n", "")
    assert "25.0% → 75.0%" in (tmp_path / "run" / "logs" / "console.log").read_text()


def test_plain_process_that_fails_shows_its_traceback(tmp_path: Path) -> None:
    done = subprocess.run(script(tmp_path, "plain", "error"), capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "The run ended early, after step 1." in done.stdout
    assert "the rollout worker died" not in done.stdout
    assert "Traceback" in done.stderr
    assert not (tmp_path / "run" / "summary.json").exists()


def test_live_process(tmp_path: Path) -> None:
    code, output = in_terminal(script(tmp_path, "auto", "end"))
    assert code == 0, output
    assert_terminal_is_sane(output)
    assert "noise" not in output
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output)
    for text in ("starting Ray", "finished", "25.0% → 75.0%", "after the run"):
        assert text in plain
    assert "step 3/3" in (tmp_path / "run" / "logs" / "console.log").read_text()


def test_live_process_that_fails(tmp_path: Path) -> None:
    code, output = in_terminal(script(tmp_path, "live", "error"))
    assert code == 1
    assert_terminal_is_sane(output)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output)
    assert "ended early" in plain
    assert output.rfind("Traceback") > output.rfind("\x1b[?25h")


def test_live_process_interrupted(tmp_path: Path) -> None:
    code, output = in_terminal(script(tmp_path, "live", "wait"), until="waiting now")
    assert code == -signal.SIGINT
    assert_terminal_is_sane(output)
    assert "KeyboardInterrupt" in output


def test_no_color_and_dumb_terminals(tmp_path: Path) -> None:
    code, output = in_terminal(script(tmp_path, "live", "end"), NO_COLOR="1")
    assert code == 0
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", output)
    (tmp_path / "dumb").mkdir()
    code, output = in_terminal(script(tmp_path / "dumb", "auto", "end"), TERM="dumb")
    assert code == 0
    assert "\x1b" not in output
    assert "step 3/3" in output


def test_actor_logging_catches_everything_up_to_a_crash(tmp_path: Path) -> None:
    code = f"""
import logging, os, sys, warnings
sys.path.insert(0, {str(ROOT)!r})
from rlkit.tracking import actor_logging
actor_logging({str(tmp_path / "logs" / "rollout-0.log")!r})
print("printed")
logging.getLogger("vllm").info("logged")
warnings.warn("warned")
os.system("echo child")
os.abort()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGABRT
    assert done.stdout + done.stderr == ""
    log = (tmp_path / "logs" / "rollout-0.log").read_text()
    for text in ("printed", "INFO vllm: logged", "warned", "child", "Fatal Python error: Aborted"):
        assert text in log


@pytest.mark.slow
@pytest.mark.ray
def test_actor_logging_in_a_ray_actor(tmp_path: Path) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import ray

@ray.remote
class Actor:
    def __init__(self, path):
        from rlkit.tracking import actor_logging
        actor_logging(path)
        print("printed in the actor")

    def work(self):
        import logging, os
        logging.getLogger("vllm").warning("logged in the actor")
        os.system("echo child of the actor")
        raise RuntimeError("failed in the actor")

ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=80 * 2**20)
env = {{"env_vars": {{"PYTHONPATH": {str(ROOT)!r}}}}}
actor = Actor.options(runtime_env=env).remote({str(tmp_path / "actor.log")!r})
try:
    ray.get(actor.work.remote(), timeout=60)
except RuntimeError as error:
    print("driver saw", "failed in the actor" in str(error))
ray.shutdown()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "driver saw True" in done.stdout
    assert "in the actor\n" not in done.stdout.replace("driver saw True", "")
    log = (tmp_path / "actor.log").read_text()
    for text in ("printed in the actor", "WARNING vllm: logged in the actor", "child of the actor"):
        assert text in log
