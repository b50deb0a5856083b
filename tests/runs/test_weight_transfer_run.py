"""A whole run, whichever way its weights go."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_fixture import Run

pytestmark = [pytest.mark.slow, pytest.mark.ray]


def test_a_run_is_the_same_whichever_way_its_weights_go(tmp_path: Path) -> None:
    ways = {
        "object_store": (),
        "gloo": ("cluster.weight_bucket_mib=1", "rollout.workers=2"),
    }
    found = {}
    for way, more in ways.items():
        (tmp_path / way).mkdir()
        started = Run(tmp_path / way, "trainer.total_steps=3", f"cluster.weight_transfer={way}", *more)
        assert started.end() == 0, started.text
        steps = [record for record in started.records() if "policy/grad_norm" in record]
        assert [record["weights/version"] for record in steps] == [1, 2, 3]
        losses = [(record["policy/loss"], record["policy/grad_norm"]) for record in steps]
        found[way] = losses, started.records("samples")
    assert found["gloo"] == found["object_store"]


def test_weights_that_go_from_process_to_process_come_between_two_steps_of_an_engine(tmp_path: Path) -> None:
    started = Run(
        tmp_path,
        "trainer.total_steps=4",
        "trainer.max_staleness=1",
        "cluster.weight_transfer=gloo",
        "cluster.weight_bucket_mib=1",
        "rollout.workers=2",
        "tracking.sample_groups_per_step=null",
    )
    assert started.end() == 0, started.text
    steps = [record for record in started.records() if "policy/grad_norm" in record]
    assert [record["weights/version"] for record in steps] == [1, 2, 3, 4]
    assert all(record["weights/canary_difference"] < 1e-3 for record in steps)
    assert max(record.get("staleness/max", 0.0) for record in steps) == 1
    assert all(record["mismatch/logprob_mean"] < 0.1 for record in steps)
    rows = started.records("samples")
    assert all(version <= row["step"] - 1 for row in rows for _, version in row["version_spans"])
    assert any(len(row["version_spans"]) > 1 for row in rows), "no response lived through new weights"


@pytest.mark.parametrize(
    ("gpus", "options"),
    [
        (1, ("cluster=single_gpu",)),  # CUDA IPC; engine and ranks take turns
        (1, ("cluster=single_gpu", "learner.zero_stage=3", "trainer.save_every_steps=1")),
        (1, ("cluster=single_gpu", "algorithm=ppo")),
        (1, ("cluster=single_gpu", "trainer.max_staleness=1")),
        (2, ("cluster=single_gpu", "cluster.placement=apart")),  # NCCL
        (2, ("cluster=multi_gpu", "rollout.workers=2", "learner.ranks=2")),
        (2, ("cluster=multi_gpu", "rollout.workers=1", "rollout.tensor_parallel_size=2", "learner.ranks=2")),
    ],
)
def test_weights_go_from_gpu_to_gpu(tmp_path: Path, gpus: int, options: tuple[str, ...]) -> None:
    import torch

    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} CUDA GPUs")
    small = ("trainer.total_steps=3", "rollout.gpu_memory_utilization=0.3", "rollout.memory_gib=1.0")
    started = Run(tmp_path, *small, *options)
    assert started.end() == 0, started.text
    steps = [record for record in started.records() if "policy/grad_norm" in record]
    assert [record["weights/version"] for record in steps] == [1, 2, 3]
    assert all(record["weights/canary_difference"] < 0.15 for record in steps)
