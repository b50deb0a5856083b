"""Waits: reported while they last, ended at their deadline with who waited for what, also where nobody can cancel."""

from __future__ import annotations

import asyncio
import io
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from rlkit.cluster.waiting import WaitedTooLongError, Watchdog, blocking, open_waits, waiting
from rlkit.config.loading import load_config
from rlkit.config.messages import ConfigError
from rlkit.config.tracking import TrackingConfig
from rlkit.tracking.run_folder import RunFolder
from rlkit.tracking.tracker import Tracker

KEY = "trainer.step_timeout_seconds"


async def two_waits(outer: float, inner: float, body: float) -> None:
    left = ["00000003", "00000007"]
    async with (
        waiting("step 4", "groups, update and new weights", outer, KEY),
        waiting("the rollout pool", lambda: f"rollout worker 1: {', '.join(left)}", inner, KEY),
    ):
        await asyncio.sleep(body / 2)
        left.pop()
        await asyncio.sleep(body / 2)


def test_a_wait_ends_at_its_deadline_and_says_who_waited_for_what_inside() -> None:
    with pytest.raises(WaitedTooLongError) as error:
        asyncio.run(two_waits(outer=0.1, inner=30, body=0.12))
    said = str(error.value)
    assert said.startswith(f"step 4 waited more than {KEY}=0.1 s for groups, update and new weights")
    inner = said.partition("Waiting at that moment: ")[2]
    assert re.match(r"the rollout pool for rollout worker 1: 00000003 \(0\.1\d* of 30 s, trainer", inner), said
    assert open_waits() == []


def test_the_inner_deadline_passes_through_the_outer_wait() -> None:
    with pytest.raises(WaitedTooLongError, match=r"the rollout pool waited more than .*=0.1 s .*: step 4 for groups"):
        asyncio.run(two_waits(outer=30, inner=0.1, body=60))
    asyncio.run(two_waits(outer=30, inner=30, body=0.01))
    assert open_waits() == []


def test_an_actors_own_time_out_is_not_the_waits() -> None:
    async def rpc() -> None:
        async with waiting("the driver", "the evaluation", 60, KEY):
            raise TimeoutError("RPC timed out")

    with pytest.raises(TimeoutError, match="RPC timed out"):
        asyncio.run(rpc())
    assert open_waits() == []


def test_a_wait_that_cannot_say_what_it_is_for_ends_all_the_same() -> None:
    async def wait() -> None:
        async with asyncio.timeout(10), waiting("the pool", lambda: {}["gone"], 0.1, KEY):
            await asyncio.sleep(60)

    with pytest.raises(
        WaitedTooLongError, match=r"the pool waited more than .*=0\.1 s for something that .* \(KeyError: 'gone'\)"
    ):
        asyncio.run(wait())


@pytest.mark.parametrize("trouble", ["closed", "blocked"])
def test_a_screen_in_trouble_does_not_stop_the_watchdog(
    trouble: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlkit.cluster.waiting.TICK_SECONDS", 0.02)
    monkeypatch.setattr("rlkit.cluster.waiting.REPORT_SECONDS", 0.1)
    asked: list[str] = []

    def say(line: str) -> None:
        asked.append(line)
        if trouble == "closed":
            raise BrokenPipeError("nobody reads")
        time.sleep(2)

    with Watchdog(say, 0.02, tmp_path / "driver.log"):
        asyncio.run(two_waits(outer=10, inner=10, body=1.5))
    assert len(asked) >= 2, "it goes on after the first report"
    if trouble == "closed":
        assert (tmp_path / "driver.log").read_text().startswith(asked[0] + "\n(could not be reported: BrokenPipeError")


def test_long_waits_are_reported_in_one_line_at_growing_intervals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlkit.cluster.waiting.TICK_SECONDS", 0.02)
    said: list[tuple[float, str]] = []
    began = time.monotonic()
    with Watchdog(lambda line: said.append((time.monotonic() - began, line)), 0.02, tmp_path / "stacks.log"):
        asyncio.run(two_waits(outer=10, inner=10, body=1.2))
    assert 3 <= len(said) <= 4, said  # after 0.2, 0.4, 0.8 s
    assert 0.2 <= said[0][0] < said[1][0] < said[2][0]
    assert said[2][0] - said[1][0] > 1.5 * (said[1][0] - said[0][0])
    for _, line in said:
        assert line.startswith("still waiting: step 4 for groups, update and new weights (0.")
        assert "; the rollout pool for rollout worker 1: 00000003" in line
    assert said[0][1].count("00000007") == 1 and "00000007" not in said[2][1], "what is left is asked for each report"


def test_short_waits_are_never_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlkit.cluster.waiting.TICK_SECONDS", 0.01)
    said: list[str] = []
    with Watchdog(said.append, 0.5, tmp_path / "stacks.log"):
        asyncio.run(two_waits(outer=10, inner=10, body=0.3))
    assert said == []


def test_a_wait_costs_next_to_nothing() -> None:
    async def many() -> float:
        began = time.perf_counter()
        for _ in range(1000):
            async with waiting("step 4", "nothing", 60, KEY):
                pass
        return (time.perf_counter() - began) / 1000

    assert asyncio.run(many()) < 1e-3


@pytest.mark.parametrize("console", ["plain", "live"])
def test_the_line_is_on_the_screen_and_in_the_runs_log(
    console: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also above a live view that redraws itself."""
    monkeypatch.setattr("rlkit.cluster.waiting.TICK_SECONDS", 0.02)
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stdout", screen)
    folder = RunFolder(tmp_path / "run")
    config = TrackingConfig(console=console, tensorboard=False)  # type: ignore[arg-type]
    with (
        Tracker(config, folder, total_steps=3, capture_output=False) as tracker,
        Watchdog(tracker.message, 0.05, folder.logs / "driver.log"),
        tracker.timed("generate"),
    ):
        asyncio.run(two_waits(outer=4, inner=4, body=0.6))
    for text in (screen.getvalue(), (folder.logs / "console.log").read_text()):
        assert " ".join(text.split()).count("still waiting: step 4 for groups, update and new weights") == 2, text


PROGRAM = """
import asyncio, sys, time
from pathlib import Path
from rlkit.cluster import waiting as module
from rlkit.cluster.waiting import Watchdog, blocking, waiting
module.TICK_SECONDS, module.GRACE_SECONDS, module.REPORT_SECONDS = 0.05, 0.3, 0.5

def library_call_that_never_returns():
    time.sleep(600)

async def blocked_loop():
    async with waiting("step 4", "groups", 0.3, "trainer.step_timeout_seconds"):
        library_call_that_never_returns()

def say(line):
    SAY

with Watchdog(say, 0.5, Path(sys.argv[1])):
    BODY
"""


@pytest.mark.parametrize(
    ("body", "who"),
    [
        ('with blocking("the end of the run", "Ray", 0.3, "END_SECONDS"): library_call_that_never_returns()', "Ray"),
        ("asyncio.run(blocked_loop())", "groups"),
    ],
)
def test_what_cannot_be_cancelled_ends_with_its_process_and_the_stacks_of_its_threads(
    body: str, who: str, tmp_path: Path
) -> None:
    stacks = tmp_path / "driver.log"
    program = textwrap.dedent(PROGRAM).replace("BODY", body).replace("SAY", "print(line, flush=True)")
    done = subprocess.run(
        [sys.executable, "-c", program, str(stacks)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1, done.stderr
    assert re.search(rf"this process hangs and is being ended: .* for {who} ", done.stdout), done.stdout
    assert "still waiting: " in done.stdout
    assert "library_call_that_never_returns" in stacks.read_text()


@pytest.mark.parametrize("say", ["raise BrokenPipeError", "time.sleep(600)"])
def test_it_is_ended_also_where_nothing_can_be_reported(say: str, tmp_path: Path) -> None:
    program = PROGRAM.replace("BODY", "asyncio.run(blocked_loop())").replace("SAY", say)
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "driver.log")], timeout=60, check=False)
    assert done.returncode == 1
    assert "library_call_that_never_returns" in (tmp_path / "driver.log").read_text()


@pytest.mark.parametrize("value", ["0", "null", ".inf"])
@pytest.mark.parametrize(
    "key",
    [
        "trainer.step_timeout_seconds",
        "trainer.startup_timeout_seconds",
        "reward.timeout_seconds",
        "trainer.report_waits_after",
    ],
)
def test_no_deadline_can_be_switched_off(key: str, value: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(key)):
        load_config(["reward=rule", f"run_dir={tmp_path / 'run'}", f"{key}={value}"])


def test_blocking_waits_are_listed_beside_the_others() -> None:
    with blocking("the start", "Ray", 60, "trainer.startup_timeout_seconds"):
        (wait,) = open_waits()
        assert str(wait).startswith("the start for Ray (")
    assert open_waits() == []
