"""`rlkit.submit` against a real Ray cluster with a token: jobs, their logs over a cut wire, exit codes, the end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from run_fixture import SMALL
from submit_fixture import ROOT, RayCluster, Wire, submit_command

pytestmark = [pytest.mark.ray, pytest.mark.cluster]


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    started = RayCluster()
    try:
        started.wait()
        yield started
    finally:
        started.end()
    assert started.processes() == []


@pytest.fixture
def small_project(tmp_path: Path) -> Path:
    """A folder of a user's: code of their own, and what must not travel."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "my_rewards.py").write_text("VALUE = 1\n")
    (folder / "runs").mkdir()
    (folder / "runs" / "old.bin").write_bytes(bytes(1000))
    return folder


def finish(process: subprocess.Popen[str], seconds: float = 120) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def working(cluster: RayCluster) -> list[str]:
    """Drivers and actors of runs on the cluster."""
    found = []
    for process in cluster.processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            found.append(" ".join(process.cmdline()))
    names = ("ray::RolloutWorker", "ray::LearnerWorker", "ray::RewardWorker", "rlkit.train")
    return [line for line in found if any(name in line for name in names)]


def test_dry_run_checks_the_cluster_and_submits_nothing(cluster: RayCluster, tmp_path: Path) -> None:
    process = submit_command(cluster, *SMALL, "dry_run=true", f"run_dir={tmp_path / 'dry'}")
    code, out, err = finish(process)
    assert code == 0, err
    assert "1 vLLM engine" in out
    assert "without a token" not in err
    assert "the job uses the uploaded rlkit" in err
    code, out, _ = finish(submit_command(cluster, "list"))
    assert code == 0
    assert "dry" not in out


def test_missing_gpus_are_named(cluster: RayCluster, tmp_path: Path) -> None:
    arguments = ["reward=rule", "cluster=single_gpu", "learner.ranks=2", "dry_run=true", f"run_dir={tmp_path / 'gpu'}"]
    code, _, err = finish(submit_command(cluster, *arguments))
    assert code == 1
    assert "not enough GPUs: no room for 2 colocated groups" in err
    code, _, err = finish(submit_command(cluster, *arguments, "submit.autoscaling=true"))
    assert code == 0, err
    assert "warning: not enough GPUs" in err


def test_wrong_token(cluster: RayCluster) -> None:
    right, cluster.token = cluster.token, "wrong"
    try:
        code, _, err = finish(submit_command(cluster, "list"))
    finally:
        cluster.token = right
    assert code == 1
    assert "does not accept this token" in err
    assert "Traceback" not in err


def test_job_says_what_is_wrong_on_the_cluster_and_its_exit_code_comes_back(
    cluster: RayCluster, small_project: Path, tmp_path: Path
) -> None:
    """A model that is not here may be there; it is not, and the job ends with rlkit.train's own code."""
    process = submit_command(
        cluster,
        "reward=rule",
        "model=hf",
        "model.path=/nowhere/model",
        f"submit.environment={{PYTHONPATH: '{ROOT}'}}",  # stands for an installed rlkit
        f"run_dir={tmp_path / 'there'}",
        cwd=small_project,
    )
    code, out, err = finish(process)
    assert code == 2, out + err
    assert "warning: model.path=/nowhere/model" in err
    assert "1 files" in err
    assert "the installed rlkit" in err
    assert "1 problem in the configuration" in out
    assert "there: failed after" in err
    assert "exit code 2" in err


def test_every_line_comes_once_over_a_wire_that_is_cut(cluster: RayCluster, tmp_path: Path) -> None:
    go_on, lines = tmp_path / "go_on", 400
    script = f"for i in range({lines}): print('line', i, flush=True)"
    wait = f"while [ ! -e {go_on} ]; do sleep 0.1; done"
    job = cluster.client().submit(f'python -c "{script}"; {wait}; python -c "{script}"; exit 7', "lines")
    wire = Wire(cluster.port)
    process = submit_command(cluster, "logs", job, address=wire.address)
    assert process.stdout is not None
    shown: list[str] = []
    while len(shown) < lines // 2 or f"line {lines - 1}" not in shown[-1]:
        shown.append(process.stdout.readline().strip())
    wire.cut()
    go_on.touch()
    time.sleep(1.5)
    wire.mend()
    code, out, err = finish(process)
    wire.cut()
    numbered = [line for line in [*shown, *out.splitlines()] if line.startswith("line ")]
    assert numbered == [f"line {i}" for i in range(lines)] * 2
    assert code == 7, err
    assert "connection lost" in err
    assert "reconnected" in err


def test_gives_up_when_the_cluster_stays_away(cluster: RayCluster) -> None:
    job = cluster.client().submit("echo here; sleep 300", "away")
    wire = Wire(cluster.port)
    process = submit_command(cluster, "logs", job, "submit.reconnect_seconds=2", address=wire.address)
    assert process.stdout is not None
    while process.stdout.readline().strip() != "here":
        pass
    wire.cut()
    code, _, err = finish(process)
    assert code == 1
    assert "no answer from" in err
    assert finish(submit_command(cluster, "stop", job))[0] == 0


def test_status_list_and_stop_by_run_name(cluster: RayCluster) -> None:
    """SIGTERM arrives, and the job is given the time it asked for to end in order."""
    trap = "trap 'sleep 4; echo in order; exit 0' TERM; echo ready; while true; do sleep 0.1; done"
    job = cluster.client().submit(
        f"exec bash -c '{trap.replace(chr(39), chr(34))}'", "named", RAY_JOB_STOP_WAIT_TIME_S="30"
    )
    process = submit_command(cluster, "logs", "named")
    assert process.stdout is not None
    while process.stdout.readline().strip() != "ready":
        pass
    code, out, _ = finish(submit_command(cluster, "status", "named"))
    assert code == 0
    assert "state    RUNNING" in out
    assert job in out
    code, out, _ = finish(submit_command(cluster, "list"))
    assert any(line.split()[:2] == ["named", "RUNNING"] for line in out.splitlines())
    code, _, err = finish(submit_command(cluster, "stop", "named"))
    assert code == 0, err
    code, out, _ = finish(process)
    assert code == 143
    assert "in order" in out
    code, _, err = finish(submit_command(cluster, "status", "namde"))
    assert code == 1
    assert "no job of a run named namde" in err


def test_ctrl_c_leaves_the_job_alone_and_says_how_to_stop_it(cluster: RayCluster) -> None:
    job = cluster.client().submit("echo ready; sleep 300", "left")
    process = submit_command(cluster, "logs", "left")
    assert process.stdout is not None
    while process.stdout.readline().strip() != "ready":
        pass
    os.killpg(process.pid, signal.SIGINT)
    code, _, err = finish(process)
    assert code == 130
    assert f"python -m rlkit.submit stop {job}" in err
    assert "Traceback" not in err
    assert "RUNNING" in finish(submit_command(cluster, "status", "left"))[1]
    assert finish(submit_command(cluster, "stop", "left"))[0] == 0


def test_second_job_in_the_same_run_folder_is_refused(cluster: RayCluster) -> None:
    job = cluster.client().submit("sleep 300", "twice")
    code, _, err = finish(submit_command(cluster, "reward=rule", "dry_run=true", "run_dir=/tmp/twice"))
    assert code == 1
    assert f"job {job} is already running in run_dir=/tmp/twice" in err
    assert finish(submit_command(cluster, "stop", "twice"))[0] == 0


@pytest.mark.slow
def test_a_run_trains_as_a_job(cluster: RayCluster, tmp_path: Path) -> None:
    """One step of training in the cluster that the job is in, with the code that was uploaded."""
    folder = tmp_path / "trained"
    process = submit_command(
        cluster, *SMALL, "trainer.total_steps=1", "trainer.prompts_per_step=2", f"run_dir={folder}"
    )
    code, out, err = finish(process, 590)
    assert code == 0, out + err
    assert "step 1/1" in out
    assert json.loads((folder / "summary.json").read_text())["steps"] == 1
    wait_until(lambda: not working(cluster), 30)


@pytest.mark.slow
def test_a_training_job_is_stopped_in_order(cluster: RayCluster, tmp_path: Path) -> None:
    """The run itself says how it ended: it was not killed, and its actors are gone."""
    folder = tmp_path / "endless"
    process = submit_command(cluster, *SMALL, "trainer.total_steps=100000", f"run_dir={folder}", "submit.follow=false")
    code, _, err = finish(process)
    assert code == 0, err
    metrics = folder / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and "policy/loss" in metrics.read_text(), 400)
    code, _, err = finish(submit_command(cluster, "stop", "endless"))
    assert code == 0, err
    code, out, err = finish(submit_command(cluster, "logs", "endless"))
    assert code == 143
    assert "rlkit: ended by SIGTERM" in out
    wait_until(lambda: not working(cluster), 30)


@pytest.mark.slow
def test_plain_ray_job_submit_works_too(cluster: RayCluster, tmp_path: Path) -> None:
    """`ray job submit --working-dir . -- python -m rlkit.train`: the run joins the cluster of its job."""
    folder = tmp_path / "plain"
    train = ["python", "-m", "rlkit.train", *SMALL, "trainer.total_steps=1", "trainer.prompts_per_step=2"]
    ray = [
        str(Path(sys.executable).parent / "ray"),
        "job",
        "submit",
        "--address",
        cluster.address,
        "--working-dir",
        str(ROOT),
        "--",
    ]
    done = subprocess.run(
        [*ray, *train, f"run_dir={folder}"],
        env={**cluster.environment(), "RAY_AUTH_MODE": "token"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=590,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((folder / "summary.json").read_text())["steps"] == 1


def test_cluster_without_a_token_is_warned_of(tmp_path: Path) -> None:
    open_cluster = RayCluster(token=False)
    try:
        open_cluster.wait()
        code, _, err = finish(
            submit_command(open_cluster, "reward=rule", "dry_run=true", f"run_dir={tmp_path / 'open'}")
        )
        assert code == 0, err
        assert "warning: the cluster answers without a token" in err
    finally:
        open_cluster.end()
