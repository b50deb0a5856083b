"""What is written beside a run: in order, to the end, and what a disk that hangs leads to."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
import weakref
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from paths import ROOT

from rlkit.cluster.waiting import WaitedTooLongError, waiting
from rlkit.config.tracking import TrackingConfig
from rlkit.experience.filters import BufferConfig, make_filter
from rlkit.tracking.recorder import Recorder
from rlkit.tracking.run_folder import RunFolder
from rlkit.tracking.tracker import Tracker
from rlkit.tracking.writer import UnwrittenError, Writer
from tests.fixtures.groups import group, value


def hanging(path: Path) -> RunFolder:
    """A pipe that nobody reads cannot be opened for writing: it stands for the disk."""
    folder = RunFolder(path)
    folder.samples.unlink()
    os.mkfifo(folder.samples)
    return folder


def test_all_is_written_in_order_and_what_fails_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer, done = Writer(tmp_path), list[int]()

    def write(step: int) -> None:
        if step == 20:
            raise OSError("no space")
        time.sleep(0.01)
        done.append(step)

    async def ask() -> list[int]:
        behind = []
        for step in range(20):
            writer.put(f"step {step}", partial(write, step))
            await writer.caught_up()
            behind.append(step + 1 - len(done))
        return behind

    assert max(asyncio.run(ask())) <= 1
    for step in (20, 21):
        writer.put(f"step {step}", partial(write, step))
    writer.settle()
    assert done == [*range(20), 21]
    assert "not written: step 20: OSError: no space" in caplog.text
    group = np.zeros(3)
    kept = weakref.ref(group)
    writer.put("step 22", partial(np.sum, group))
    del group
    writer.settle()
    time.sleep(0.1)
    assert kept() is None, "what is written is not held until something else is"
    writer.close()


def test_a_disk_that_hangs_is_waited_for_until_a_deadline_and_nothing_is_lost_if_it_answers(tmp_path: Path) -> None:
    folder = hanging(tmp_path / "run")
    recorder = Recorder(TrackingConfig(), folder, make_filter(BufferConfig()))

    async def record() -> None:
        for step in (1, 2):
            recorder.failed(step, [group(f"g{step}", [value(1.0)])])
            async with waiting("the driver", folder.writer.unwritten, 0.5, "KEY"):
                await folder.writer.caught_up()

    where = rf"samples.jsonl and tokens/ of step 2 to be written in {folder.path} \(.* name another run_dir\)"
    with pytest.raises(WaitedTooLongError, match=rf"KEY=0.5 s for samples.jsonl and tokens/ of step 1, {where}"):
        asyncio.run(record())
    folder.writer.seconds = 0.5
    with pytest.raises(UnwrittenError, match=rf"more than 0.5 s for samples.jsonl and tokens/ of step 1, {where}"):
        folder.close()
    folder.close()
    with folder.samples.open() as pipe:
        assert [json.loads(line)["step"] for line in iter(pipe.readline, "")] in ([1], [1, 2])


def test_a_process_whose_disk_hangs_says_so_and_ends(tmp_path: Path) -> None:
    code = f"""
import os, sys
from rlkit.config.tracking import TrackingConfig
from rlkit.supervision import supervised
from rlkit.tracking import RunFolder, Tracker

async def work(tracker, closing):
    folder.writer.put("samples.jsonl of step 1", lambda: folder.append_samples([{{"step": 1}}]))

folder = RunFolder({str(tmp_path / "run")!r})
folder.samples.unlink()
os.mkfifo(folder.samples)
folder.writer.seconds = 1.0
config = TrackingConfig(console="plain", trackers=())
sys.exit(supervised(folder, lambda: Tracker(config, folder, 1), 0.5, [], work))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 1
    assert f"rlkit: waited more than 1 s for samples.jsonl of step 1 to be written in {tmp_path}/run" in done.stderr


def test_a_disk_that_takes_not_even_the_warning_does_not_end_the_thread(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for file in (folder.samples, folder.logs / "console.log"):
        file.unlink(missing_ok=True)
        file.symlink_to("/dev/full")
    folder.writer.seconds = 5.0
    tracker, done = Tracker(TrackingConfig(console="off", trackers=()), folder, 2, capture_output=False), list[int]()
    for step in (1, 2):
        folder.writer.put(f"step {step}", lambda: folder.append_samples([{"step": 1}]))
        folder.writer.put(f"step {step}", partial(done.append, step))
    folder.writer.settle()
    assert done == [1, 2]
    with pytest.raises(OSError, match="No space left"):
        tracker.close()


def test_a_full_disk_is_said_on_the_screen(tmp_path: Path) -> None:
    """Although the transcript of the screen is on it."""
    code = f"""
import sys
from rlkit.config.tracking import TrackingConfig
from rlkit.supervision import supervised
from rlkit.tracking import RunFolder, Tracker

async def work(tracker, closing):
    tracker.phase("loading")

folder = RunFolder({str(tmp_path / "run")!r})
(folder.logs / "console.log").symlink_to("/dev/full")
config = TrackingConfig(console="plain", trackers=())
sys.exit(supervised(folder, lambda: Tracker(config, folder, 1), 0.5, [], work))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.startswith("rlkit: the disk is full")
