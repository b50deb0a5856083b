"""Where actors go: bundles, a cluster without room, and two Ray nodes on this machine (with a token)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from ray_fixture import ray_session  # noqa: F401
from run_fixture import Run
from submit_fixture import free_port

from rlkit.cluster.placement import Bundle, NoRoomError, plan_bundles, reserve
from rlkit.config.load import load_config
from rlkit.config.schema import RunConfig


def config_of(*overrides: str) -> RunConfig:
    return load_config(["reward=polar", "run_dir=/nowhere/run", *overrides]).config


def test_actors_of_equal_number_stand_together() -> None:
    config = config_of("cluster=single_gpu", "rollout.workers=2", "learner.ranks=3")
    bundles = plan_bundles(config, critic_ranks=1, reward_workers=2)
    assert bundles == [
        Bundle(("rollout-0", "learner-0", "critic-0", "reward-0"), 0.95),
        Bundle(("rollout-1", "learner-1", "reward-1"), 0.85),
        Bundle(("learner-2",), 0.3),
    ]


def test_apart_and_wide_engines_stand_alone() -> None:
    config = config_of("cluster=single_gpu", "cluster.placement=apart")
    assert plan_bundles(config, critic_ranks=0, reward_workers=1) == [
        Bundle(("rollout-0",), 1.0),
        Bundle(("learner-0",), 1.0),
        Bundle(("reward-0",), 1.0),
    ]
    config = config_of("cluster=single_gpu", "rollout.tensor_parallel_size=4", "learner.ranks=2")
    assert plan_bundles(config, critic_ranks=0, reward_workers=1) == [
        Bundle(("learner-0", "reward-0"), 0.4),
        Bundle(("learner-1",), 0.3),
        Bundle(("rollout-0",), 4.0),
    ]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_a_cluster_without_room_says_what_was_asked_for_and_what_there_is() -> None:
    config = config_of("cluster=single_gpu")
    bundles = plan_bundles(config, critic_ranks=0, reward_workers=1)
    with pytest.raises(NoRoomError, match=r"rollout-0 \+ learner-0 \+ reward-0: 0\.9 GPUs\. Its nodes: .* 0 GPUs"):
        asyncio.run(reserve(config, bundles, 1.0))


class TwoNodes:
    """Two raylets on this machine: `ray start --head --block` and `ray start --address=... --block`."""

    def __init__(self) -> None:
        self.token = secrets.token_hex(16)
        self.folder = tempfile.mkdtemp(prefix="rlkit-", dir="/tmp")  # short: Ray's socket names go below it
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        ray = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--disable-usage-stats", "--num-cpus=1"]
        ray += ["--object-store-memory=100000000", "--node-ip-address=127.0.0.1"]
        ray += ["--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"]
        head = ["--head", f"--port={self.port}", f"--temp-dir={self.folder}/ray", "--include-dashboard=false"]
        self.nodes = [self._start([*ray, *head])]
        deadline = time.monotonic() + 90
        while not self._raylets(self.nodes[0]):
            assert time.monotonic() < deadline, "the head node does not start"
            time.sleep(0.2)
        time.sleep(2)
        self.nodes.append(self._start([*ray, f"--address={self.address}"]))
        while not self._raylets(self.nodes[1]):
            assert time.monotonic() < deadline, "the second node does not start"
            time.sleep(0.2)

    def environment(self) -> dict[str, str]:
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}

    def _start(self, command: list[str]) -> subprocess.Popen[bytes]:
        others = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        return subprocess.Popen(
            command,
            env={**others, **self.environment(), "HOME": self.folder},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _raylets(self, node: subprocess.Popen[bytes]) -> list[psutil.Process]:
        return [p for p in psutil.Process(node.pid).children(recursive=True) if p.name() == "raylet"]

    def actors(self, node: int) -> set[str]:
        """What runs on a node: `RolloutWorker`, `LearnerWorker`, ..."""
        found = set()
        for process in psutil.Process(self.nodes[node].pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                title = (process.cmdline() or [""])[0]
                if title.startswith("ray::"):
                    found.add(title.removeprefix("ray::").partition(".")[0].split()[0])
        return found

    def lose(self, node: int) -> None:
        """kill -9 of everything on it, at once."""
        process = psutil.Process(self.nodes[node].pid)
        for one in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()

    def end(self) -> None:
        for node in self.nodes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGTERM)
        for node in self.nodes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                node.wait(15)
        for index, node in enumerate(self.nodes):
            if node.poll() is None:
                self.lose(index)
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[TwoNodes]:
    nodes = TwoNodes()
    for name, value in nodes.environment().items():
        monkeypatch.setenv(name, value)
    yield nodes
    nodes.end()


DEFAULT_STORE = "cluster.object_store_gib=0.5"  # the small runs have another, which a joined Ray refuses
TWO = ("rollout.workers=2", "learner.ranks=2", "algorithm=rloo", "trainer.total_steps=2", DEFAULT_STORE)


def steps(run: Run) -> list[dict[str, float]]:
    return [record for record in run.records() if record["kind"] == "step"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_nodes_do_what_one_process_of_each_kind_does(cluster: TwoNodes, tmp_path: Path, stage: int) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    spread = Run(
        tmp_path / "two",
        *TWO,
        f"learner.zero_stage={stage}",
        f"cluster.address={cluster.address}",
        "cluster.strategy=STRICT_SPREAD",
    )
    spread.wait_until(lambda: bool(steps(spread)))
    for node in (0, 1):
        assert {"RolloutWorker", "LearnerWorker"} <= cluster.actors(node)
    assert spread.end() == 0, spread.text
    os.environ.pop("RAY_AUTH_MODE", None)  # a Ray of its own
    os.environ.pop("RAY_AUTH_TOKEN", None)
    alone = Run(tmp_path / "one", "algorithm=rloo", "trainer.total_steps=2")
    assert alone.end() == 0, alone.text
    for two, one in zip(steps(spread), steps(alone), strict=True):
        for name in ("policy/loss", "policy/grad_norm", "reward/mean", "length/mean"):
            assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name
    texts = [{(r["group_id"], r["rank"]): r["token_ids"] for r in run.records("samples")} for run in (spread, alone)]
    assert texts[0] == texts[1]


@pytest.mark.slow
def test_losing_a_node_ends_the_run_with_the_cause_and_it_goes_on_without_it(cluster: TwoNodes, tmp_path: Path) -> None:
    options = ("trainer.save_every_steps=1", "resume=auto")
    run = Run(
        tmp_path,
        *TWO,
        *options,
        "trainer.total_steps=1000",
        f"cluster.address={cluster.address}",
        "cluster.strategy=STRICT_SPREAD",
        "trainer.startup_timeout_seconds=120",
    )
    run.wait_until(lambda: (run.folder / "checkpoints" / "step_000001").exists())
    cluster.lose(1)
    began = time.monotonic()
    assert run.end(300) == 1, run.text
    assert time.monotonic() - began < 200
    assert "rlkit: " in run.text and ("died" in run.text or "dead" in run.text.lower()), run.text
    done = max(int(p.name[5:]) for p in (run.folder / "checkpoints").glob("step_*"))
    again = Run(
        tmp_path,
        *options,
        "algorithm=rloo",
        f"trainer.total_steps={done + 1}",
        f"cluster.address={cluster.address}",
        DEFAULT_STORE,
    )
    assert again.end() == 0, again.text
    assert [step["step"] for step in steps(again)][-1] == done + 1
