"""Where actors go: bundles, a cluster without room, and two Ray nodes on this machine (with a token)."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
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
import torch
from paths import FIXTURES, PYTHONPATH
from ray_fixture import ray_session  # noqa: F401
from run_fixture import Run
from submit_fixture import free_port
from wide_engine import CANARY, write_plugin

from rlkit.cluster.placement import BUNDLES, Bundle, NoRoomError, on_one_node, plan_bundles, reserve
from rlkit.config.loading import load_config
from rlkit.config.schema import RunConfig
from rlkit.rollout.engine import executor, shared_gpus_environment


def config_of(*overrides: str) -> RunConfig:
    return load_config(["reward=polar", "run_dir=/nowhere/run", *overrides]).config


def test_actors_of_equal_number_stand_together() -> None:
    """On a GPU of their own: Ray would put two bundles with parts of a GPU on one."""
    config = config_of("cluster=single_gpu", "rollout.workers=2", "learner.ranks=3")
    bundles = plan_bundles(config, critic_ranks=1, reward_workers=2)
    assert bundles == [
        Bundle(("rollout-0", "learner-0", "critic-0", "reward-0"), 1.0),
        Bundle(("rollout-1", "learner-1", "reward-1"), 1.0),
        Bundle(("learner-2",), 1.0),
    ]
    on_cpu = plan_bundles(config_of("rollout.workers=2", "learner.ranks=1"), critic_ranks=0, reward_workers=1)
    assert on_cpu == [Bundle(("rollout-0", "learner-0", "reward-0"), 0.0), Bundle(("rollout-1",), 0.0)]


def test_an_engine_stands_with_as_many_ranks_as_it_has_gpus() -> None:
    wide = ("cluster=single_gpu", "rollout.workers=2", "rollout.tensor_parallel_size=2")
    assert plan_bundles(config_of(*wide, "learner.ranks=5"), critic_ranks=1, reward_workers=1) == [
        Bundle(("rollout-0", "learner-0", "critic-0", "reward-0"), 1.0),
        Bundle(("rollout-0", "learner-1"), 1.0),
        Bundle(("rollout-1", "learner-2"), 1.0),
        Bundle(("rollout-1", "learner-3"), 1.0),
        Bundle(("learner-4",), 1.0),
    ]
    assert [bundle.members for bundle in plan_bundles(config_of(*wide), critic_ranks=0, reward_workers=1)] == [
        ("rollout-0", "learner-0", "reward-0"),
        ("rollout-0",),
        ("rollout-1",),
        ("rollout-1",),
    ]


def test_apart_everything_stands_alone() -> None:
    config = config_of("cluster=single_gpu", "cluster.placement=apart", "rollout.tensor_parallel_size=4")
    assert plan_bundles(config, critic_ranks=0, reward_workers=1) == [
        Bundle(("rollout-0",), 4.0),
        Bundle(("learner-0",), 1.0),
        Bundle(("reward-0",), 1.0),
    ]


def test_what_does_not_start_takes_no_gpu() -> None:
    """Training on recorded responses: no engine, no reward."""
    for placement in ("colocated", "apart"):
        chosen = ["algorithm=sft", "cluster=single_gpu", f"cluster.placement={placement}"]
        config = load_config([*chosen, "run_dir=/nowhere/run"]).config
        assert plan_bundles(config, critic_ranks=0, reward_workers=0) == [Bundle(("learner-0",), 1.0)]


def test_the_gpus_of_an_engine_are_on_one_node_wherever_ray_put_its_bundles() -> None:
    wide = [(0, 1), (2, 3)]
    assert on_one_node(5, wide, "aaaaa") == [0, 1, 2, 3, 4]
    assert on_one_node(5, wide, "abbba") == [0, 4, 1, 2, 3]
    assert on_one_node(5, wide, "cabab") == [1, 3, 2, 4, 0]
    with pytest.raises(
        NoRoomError, match=r"reserved 5 GPUs on 2 nodes \(4, 1\), but 2 engines of 3 GPUs .* do not fit there"
    ):
        on_one_node(5, [(0, 1, 2), (3, 4, 5)], "aabaa")


def test_vllm_is_told_where_its_workers_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(BUNDLES, raising=False)
    assert [executor(gpus) for gpus in (1, 2)] == ["uni", "mp"]
    monkeypatch.setenv(BUNDLES, "2,3")
    assert [executor(gpus) for gpus in (1, 2)] == ["uni", "ray"]
    told = {BUNDLES, *shared_gpus_environment(0.5)}
    assert shared_gpus_environment(0.5)["VLLM_RAY_PER_WORKER_GPUS"] == "0.5"
    spec = importlib.util.find_spec("vllm")  # not imported: that takes seconds
    assert spec is not None and spec.origin is not None
    known = Path(spec.origin).with_name("envs.py").read_text()
    assert [name for name in told if f'os.getenv("{name}"' not in known] == [], "vLLM has renamed them"


GPU_CASES: dict[str, dict[str, list[int]]] = {
    "rollout.workers=3 learner.ranks=2": {"rollout-0": [0], "rollout-1": [1], "rollout-2": [2]},
    "rollout.workers=2 rollout.tensor_parallel_size=2 learner.ranks=4": {"rollout-0": [0, 1], "rollout-1": [2, 3]},
    "rollout.tensor_parallel_size=2 learner.ranks=3": {"rollout-0": [0, 1]},
}
"""Overrides -> which numbers of ranks an engine shares GPUs with."""


@pytest.mark.slow
def test_real_actors_get_the_gpus_they_are_meant_for() -> None:
    """On a Ray with four GPUs that do not exist; engine 0 was killed and replaced before the others were started."""
    script = FIXTURES / "gpu_places.py"
    done = subprocess.run(
        [sys.executable, str(script), *GPU_CASES],
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for (case, engines), line in zip(GPU_CASES.items(), done.stdout.splitlines(), strict=True):
        gpus: dict[str, list[int]] = json.loads(line)
        of_rank = {i: gpus[f"learner-{i}"] for i in range(4) if f"learner-{i}" in gpus}
        assert all(len(own) == 1 for own in of_rank.values()), case
        assert len({own[0] for own in of_rank.values()}) == len(of_rank), f"{case}: two ranks share a GPU: {gpus}"
        assert gpus["critic-0"] == gpus["reward-0"] == of_rank[0], (case, gpus)
        engine_gpus = [gpu for name in engines for gpu in gpus[name]]
        assert len(set(engine_gpus)) == len(engine_gpus), f"{case}: two engines share a GPU: {gpus}"
        for name, numbers in engines.items():
            assert len(gpus[name]) == len(numbers)
            for gpu, number in zip(gpus[name], numbers, strict=True):
                assert of_rank.get(number, [gpu]) == [gpu], (case, name, gpus)


@pytest.mark.slow
def test_vllm_starts_an_engine_over_two_places_and_again_when_it_died(tmp_path: Path) -> None:
    """The real vLLM, its Ray executor and our receiver in its workers; only what Ray calls a GPU is a CPU."""
    from transformers import AutoModelForCausalLM

    from rlkit.models.folder import model_folder

    script = FIXTURES / "wide_engine.py"
    write_plugin(tmp_path / "plugin")
    path = [str(tmp_path / "plugin"), PYTHONPATH]
    done = subprocess.run(
        [sys.executable, str(script), "gloo", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    model = AutoModelForCausalLM.from_pretrained(model_folder("embedded:policy"), dtype=torch.float32)
    with torch.no_grad():
        logprobs = model(torch.tensor(CANARY)).logits[0, :-1].log_softmax(-1)
    wanted = [float(row[token]) for row, token in zip(logprobs, CANARY[0][1:], strict=True)]
    for found in json.loads(done.stdout.splitlines()[-1]):
        assert found == pytest.approx(wanted, abs=1e-3)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_a_cluster_without_room_says_what_was_asked_for_and_what_there_is() -> None:
    config = config_of("cluster=single_gpu")
    bundles = plan_bundles(config, critic_ranks=0, reward_workers=1)
    with pytest.raises(NoRoomError, match=r"rollout-0 \+ learner-0 \+ reward-0: 1 GPUs\. Its nodes: .* 0 GPUs"):
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
            cwd=self.folder,  # not the one where the run is typed
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
def test_actors_find_what_is_relative_to_where_the_run_is_typed(cluster: TwoNodes, tmp_path: Path) -> None:
    """Ray was started in another folder."""
    (tmp_path / "here").mkdir()
    (tmp_path / "here/schema.json").write_text('{"type": "object"}')
    (tmp_path / "here/plain.jinja").write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    run = Run(
        tmp_path,
        *("reward=json_schema", "reward.schema_file=schema.json", "model.chat_template=plain.jinja"),
        *("trainer.total_steps=1", DEFAULT_STORE, f"cluster.address={cluster.address}"),
        cwd=tmp_path / "here",
    )
    assert run.end() == 0, run.text


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
