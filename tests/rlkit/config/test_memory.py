"""Predicted memory: presets fit the models they name, what cannot fit is refused with what would help."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from prm_fixture import write_chat_model, write_rollouts

from benchmarks.memory import PRESETS, SHAPES, write_model
from rlkit.config.loading import load_config
from rlkit.config.machine import gpus_here, host_memory
from rlkit.config.memory import GIB, gpu_phases, processes, total
from rlkit.config.messages import ConfigError
from rlkit.config.parts import ResolvedRun
from rlkit.config.store import object_store_bytes
from rlkit.train import main
from rlkit.train_reward import main as train_reward


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    for name in ("0.5B", "1.5B", "3B", "7B", "32B", "72B"):
        write_model(SHAPES[name], folder / name, random=False)
    return folder


def load(model: Path, *overrides: str) -> ResolvedRun:
    arguments = ["model=hf", f"model.path={model}", "reward=rule", f"run_dir={model.parent}/run", "dry_run=true"]
    return load_config([*arguments, *overrides])


def refused(model: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load(model, *overrides)
    return str(error.value)


@pytest.mark.parametrize(("preset", "model"), PRESETS)
def test_a_preset_fits_the_model_it_names(shapes: Path, preset: str, model: str) -> None:
    run = load(shapes / model, f"cluster={preset}", "cluster.gpu_memory_gib=80", "cluster.host_memory_gib=1000")
    assert max(map(total, gpu_phases(run, 80 * GIB).values())) < 75 * GIB
    assert run.config.learner.gradient_checkpointing
    assert not run.config.rollout.enforce_eager


@pytest.mark.parametrize(
    ("preset", "model", "words"),
    [
        (
            "single_gpu",
            "7B",
            ["80.0 GiB would have to hold", "Adam's moments 56.7 GiB", "cluster=multi_gpu (-"],
        ),
        ("multi_gpu", "72B", ["weights (135.4 GiB)", "rollout.tensor_parallel_size=4", "cluster=multi_node (-"]),
    ],
)
def test_what_cannot_fit_is_refused_with_what_would_help(
    shapes: Path, preset: str, model: str, words: list[str]
) -> None:
    message = refused(shapes / model, f"cluster={preset}", "cluster.gpu_memory_gib=80")
    for word in words:
        assert word in message


@pytest.mark.parametrize("change", ["algorithm.kl_coefficient=0", "cluster=multi_gpu"])
def test_a_named_change_saves_what_it_says(shapes: Path, change: str) -> None:
    asked = ["cluster=single_gpu", "cluster.gpu_memory_gib=66"]
    message = refused(shapes / "3B", *asked)
    saved = float(message.split(f"{change} (-")[1].split(" GiB")[0])
    needed = float(message.split("would have to hold ")[1].split(" GiB")[0])
    after = load(shapes / "3B", *asked, change)
    assert max(map(total, gpu_phases(after, 66 * GIB).values())) / GIB == pytest.approx(needed - saved, abs=0.2)


def test_without_a_known_gpu_nothing_is_refused_and_the_plan_tells_sizes(
    shapes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if gpus_here():
        pytest.skip("this machine has GPUs")
    arguments = ["model=hf", f"model.path={shapes / '7B'}", "reward=rule", "cluster=single_gpu", "dry_run=true"]
    assert main([*arguments, f"run_dir={shapes}/run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert next(line for line in lines if "GPU, update" in line).split()[-2:] == ["161.3", "GiB"]
    assert any("a machine of 8 GPUs" in line for line in lines)


def test_a_run_without_its_gpus_is_refused_at_once(shapes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if gpus_here():
        pytest.skip("this machine has GPUs")
    assert main(["reward=rule", "cluster=single_gpu", f"run_dir={shapes}/never"]) == 2
    assert "this machine has none; cluster=local_cpu runs on its CPU" in capsys.readouterr().err
    assert not (shapes / "never").exists()


SMI = """#!/bin/sh
echo "GPU-aa11, 81559"
echo "GPU-bb22, 40960"
"""


@pytest.fixture
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvidia-smi").write_text(SMI)
    (tmp_path / "bin" / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize(
    ("visible", "mib"),
    [
        (None, [81559, 40960]),
        ("", []),
        ("1", [40960]),
        ("1, 0", [40960, 81559]),
        ("0,7,1", [81559]),  # what follows an unknown one does not count
        ("GPU-bb", [40960]),
        ("MIG-cc33,MIG-dd44", [40960, 40960]),
    ],
)
@pytest.mark.usefixtures("two_gpus")
def test_gpus_are_those_that_cuda_shows(visible: str | None, mib: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpus_here() == [size * 2**20 for size in mib]


@pytest.mark.usefixtures("two_gpus")
def test_more_ranks_than_visible_gpus_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    own = [
        f"data.path={write_rollouts(tmp_path / 'rows.jsonl')}",
        f"reward.model_path={write_chat_model(tmp_path / 'model')}",
    ]
    assert train_reward([*own, "device=cuda", "reward.ranks=2", f"run_dir={tmp_path}/never"]) == 2
    assert "needs 2 GPUs, but this machine has 1 for this process (CUDA_VISIBLE_DEVICES=1)" in capsys.readouterr().err
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("rollout.memory_gib=500", "rollout.memory_gib=500"),
        ("cluster.object_store_gib=1000000", "cluster.object_store_gib=1000000"),
        ("rollout.workers=64", "rollout engine: 64 x 1.8 GiB"),
        ("cluster.host_memory_gib=2", "it has 2.0 GiB"),
    ],
)
def test_more_host_memory_than_there_is_is_refused(tmp_path: Path, override: str, key: str) -> None:
    if override == "rollout.workers=64" and host_memory() > 100 * GIB:
        pytest.skip("they fit")
    with pytest.raises(ConfigError, match="of memory") as error:
        load_config(["reward=rule", f"run_dir={tmp_path}/run", override])
    assert key in str(error.value)


def test_more_threads_than_cores_is_a_warning(tmp_path: Path) -> None:
    run = load_config(["reward=rule", f"run_dir={tmp_path}/run", "cluster.threads_per_actor=1000"])
    assert ["cores" in str(warning) for warning in run.warnings] == [True]


def test_engines_share_heads_equally(shapes: Path) -> None:
    message = refused(shapes / "0.5B", "cluster=multi_node")
    assert "4 GPUs cannot share the model's 14 attention heads and 2 key-value heads equally; 2 can" in message


def test_more_gpus_than_one_machine_has_is_a_warning(shapes: Path) -> None:
    run = load(shapes / "7B", "cluster=multi_gpu", "rollout.tensor_parallel_size=2")
    assert "it needs 16 GPUs" in str(run.warnings)
    assert "cluster.address" not in str(load(shapes / "7B", "cluster=multi_gpu").warnings)


def test_the_object_store_has_room_for_the_weights(shapes: Path, tmp_path: Path) -> None:
    small = load_config(["reward=rule", f"run_dir={tmp_path}/run"])
    assert object_store_bytes(small) == 0.5 * GIB
    large = load(shapes / "0.5B", "cluster.host_memory_gib=100")
    assert object_store_bytes(large) > 2 * 4 * 494e6
    asked = load(shapes / "0.5B", "cluster.host_memory_gib=100", "cluster.object_store_gib=3")
    assert object_store_bytes(asked) == 3 * GIB


def test_a_sleeping_engine_and_an_offloaded_rank_leave_their_gpu(shapes: Path) -> None:
    run = load(shapes / "7B", "cluster=multi_gpu", "cluster.gpu_memory_gib=80")
    phases = gpu_phases(run, 80 * GIB)
    assert total({name: size for name, size in phases["sample"].items() if "rank" in name}) < 2 * GIB
    assert total({name: size for name, size in phases["update"].items() if "engine" in name}) < 3 * GIB
    rank = next(process for process in processes(run, 80 * GIB) if process.name == "learner rank")
    assert rank.host() > 4 * 7.6e9 / 8 * 3  # masters and moments wait in the host's memory


@pytest.mark.slow
def test_the_prediction_is_within_15_percent_of_a_measured_rank() -> None:
    """The smallest row of the benchmark: a real rank of a random model of 40 million parameters."""
    command = [sys.executable, "benchmarks/memory.py", "--json", "--row", "0.04B ZeRO 1, 1 rank"]
    root = Path(__file__).parents[3]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True, cwd=root)
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["predicted"] == pytest.approx(row["measured"], rel=0.15)
