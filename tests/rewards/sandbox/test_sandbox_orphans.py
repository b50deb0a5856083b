"""No sandbox outlives whoever started it, at whatever moment of its start that one is killed or gives it up."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from paths import FIXTURES
from sandbox_fixture import LIMITS, need_bubblewrap

from rewards.services.sandbox.bubblewrap import Bubblewrap
from rlkit.cluster.janitor import ORPHANS_SECONDS

FOREVER = "import time; time.sleep(500)"
AS_A_RUN = """
    import contextlib, os, sys, threading
    from pathlib import Path
    sys.path[:0] = [{tests!r}]
    from rlkit.cluster.janitor import TOKEN, janitor
    from sandbox_fixture import LIMITS, Bubblewrap, run
    os.environ[TOKEN] = {folder!r}
    stack = contextlib.ExitStack()
    stack.enter_context(janitor({folder!r}, Path({folder!r}, "run"), Path({folder!r}, "logs")))
    sandbox = Bubblewrap(LIMITS, 2)
    sandbox.start()
"""
"""How a parent of sandboxes begins: what it leaves when it is killed is ended after ORPHANS_SECONDS."""


def sandboxes(folder: Path) -> list[psutil.Process]:
    """Processes of sandboxes that see this folder (its path is in the command line of each bwrap)."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.name() == "bwrap" and str(folder) in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def left_after(folder: Path, seconds: float) -> list[psutil.Process]:
    end = time.monotonic() + seconds
    while (left := sandboxes(folder)) and time.monotonic() < end:
        time.sleep(0.05)
    return left


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the sandboxes of this test have their files; none of them is left after the test."""
    need_bubblewrap()
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    yield tmp_path
    for process in sandboxes(tmp_path):
        process.kill()


def test_a_sandbox_given_up_while_it_is_built_is_gone(folder: Path) -> None:
    """bwrap's outer process killed alone leaves the inner one: with 3 to 30 ms nearly every one of these did."""
    sandbox = Bubblewrap(LIMITS, 1)
    sandbox.start()
    began = time.monotonic()
    for milliseconds in range(3, 31, 3):
        with pytest.raises(TimeoutError):
            sandbox.run_program(FOREVER, "", time.monotonic() + milliseconds / 1000)
    assert left_after(folder, 2) == []
    assert time.monotonic() - began < 20, "what is left holds the pipes, for which the supervisor waits"
    sandbox.close()


LATE = """
    late = Path({folder!r}, "late-bwrap")
    late.write_text("#!/bin/sh\\necho $$ >{folder}/begun && mv {folder}/begun {folder}/process; exec sleep 500\\n")
    late.chmod(0o755)
    sandbox._layout._tools["bwrap"] = str(late)
    run(sandbox, {code!r})
"""


def start_parent(script: str, folder: Path) -> subprocess.Popen[bytes]:
    text = textwrap.dedent(AS_A_RUN + script).format(tests=str(FIXTURES), folder=str(folder), code=FOREVER)
    return subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE)


@pytest.mark.slow
def test_what_is_not_tied_to_its_parent_when_that_is_killed_ends_with_the_run(folder: Path) -> None:
    """bwrap asks the kernel to die with its parent, then lets its inner process go on, which waits for ever if it is
    killed in these 40 microseconds. Here nothing ever asks."""
    parent = start_parent(LATE, folder)
    end = time.monotonic() + 60
    while not (folder / "process").exists():
        assert parent.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    late = psutil.Process(int((folder / "process").read_text()))
    parent.kill()
    parent.communicate()
    psutil.wait_procs([late], timeout=2 * ORPHANS_SECONDS)
    assert not late.is_running()


BUSY = """
    for _ in range(2):
        threading.Thread(target=run, args=(sandbox, {code!r})).start()
    print("started", flush=True)
"""


@pytest.mark.parametrize("seconds", [0.0, 0.01, 0.02, 0.04, 1.0])
def test_sandboxes_of_a_verifiers_threads_are_gone_when_it_is_killed(seconds: float, folder: Path) -> None:
    """While they are built, and while they run."""
    parent = start_parent(BUSY, folder)
    assert parent.stdout is not None and parent.stdout.readline() == b"started\n"
    time.sleep(seconds)
    assert seconds < 1.0 or len(sandboxes(folder)) == 4
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    time.sleep(0.2)
    assert left_after(folder, 2 * ORPHANS_SECONDS) == []
    end = time.monotonic() + 5
    while (files := list(folder.glob("rlkit-sandbox-*"))) and time.monotonic() < end:
        time.sleep(0.02)
    assert files == []
