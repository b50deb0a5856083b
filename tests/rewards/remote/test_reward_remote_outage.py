"""A reward server that is killed in mid-run and comes back, with a real pool or a whole run in between."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path

import pytest
from ray_fixture import ray_session, run  # noqa: F401
from reward_samples import make_group
from run_fixture import Run
from serve_fixture import Server

from rewards.base import RewardContext
from rlkit.experience.scores import RewardFailed, check_failures
from rlkit.serving.pool import RewardPool, Scored

pytestmark = pytest.mark.ray
RULE = "reward=rule"


def values(scored: Scored) -> list[str | float]:
    return [s.reason if s.value is None else s.value for own in scored.scores for s in own.samples]


def kill(server: Server) -> None:
    """kill -9 of the server's process."""
    os.kill(server.process.pid, signal.SIGKILL)
    server.process.wait(timeout=10)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_an_outage_shorter_than_the_deadline_costs_nothing_a_longer_one_is_named_and_passes(tmp_path: Path) -> None:
    server = Server(tmp_path / "first.txt", RULE).ready()
    port = server.port
    group, right = make_group("a", ["#### 42", "#### 41"]), [1.0, 0.0]

    async def check() -> None:
        nonlocal server
        options = {"_target_": "rewards.remote.RemoteReward", "url": server.url}
        patient = RewardPool({**options, "timeout_seconds": 100.0}, RewardContext(), 60)
        hasty = RewardPool({**options, "timeout_seconds": 2.0}, RewardContext(), 60)
        await asyncio.gather(patient.start(), hasty.start())
        try:
            assert values(await patient.score([[group]])) == right
            kill(server)
            waiting = asyncio.create_task(patient.score([[group]]))
            given_up = await hasty.score([[group]])
            assert all(str(reason).startswith("timeout: no scores from") for reason in values(given_up))
            assert "ConnectError" in str(values(given_up)[0]), "the last problem is named"
            assert given_up.report.failures == {"timeout": 2}
            with pytest.raises(RewardFailed, match=r"2 x timeout, for example: timeout: no scores from http"):
                check_failures(given_up.report, 0.2, "reward remote")
            assert not waiting.done()
            server = await asyncio.to_thread(lambda: Server(tmp_path / "second.txt", RULE, port=port).ready())
            assert values(await waiting) == right, "no sample is lost"
            assert values(await hasty.score([[group]])) == right
            assert [pool.health()[0]["restarts"] for pool in (patient, hasty)] == [0, 0], "no worker had to be killed"
        finally:
            await asyncio.gather(patient.close(), hasty.close())

    try:
        run(check())
    finally:
        server.end()


@pytest.mark.slow
def test_a_run_survives_the_loss_of_its_reward_server(tmp_path: Path) -> None:
    server = Server(tmp_path / "first.txt", RULE).ready()
    port = server.port
    arguments = ("reward=remote", f"reward.url={server.url}", "trainer.total_steps=8", "reward.timeout_seconds=600")
    run = Run(tmp_path, *arguments)
    try:
        run.wait_until(lambda: sum("policy/loss" in record for record in run.records()) >= 2, seconds=400)
        kill(server)
        server = Server(tmp_path / "second.txt", RULE, port=port).ready()
        assert run.end(400) == 0, run.text
        summary = json.loads((run.folder / "summary.json").read_text())
        assert summary["steps"] == 8
        assert summary["reward_failed"] == 0
    finally:
        run.clean_up()
        server.end()
