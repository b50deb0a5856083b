"""GPUs that actors ask for: sums that fit, and nothing on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlkit.config.load import load_config
from rlkit.config.problems import ConfigError
from rlkit.config.shares import GpuShares, gpu_shares


def shares(tmp_path: Path, *overrides: str) -> GpuShares:
    return gpu_shares(load_config(["reward=rule", f"run_dir={tmp_path / 'run'}", *overrides]).config)


def test_all_that_is_colocated_fits_on_one_gpu(tmp_path: Path) -> None:
    one = shares(tmp_path, "cluster=single_gpu")
    assert one.engine + one.learner + one.critic + one.rewards == pytest.approx(1.0)


def test_apart_means_whole_gpus(tmp_path: Path) -> None:
    apart = shares(tmp_path, "cluster=single_gpu", "cluster.placement=apart", "rollout.tensor_parallel_size=4")
    assert apart == GpuShares(4.0, 1.0, 1.0, 1.0)
    assert shares(tmp_path, "cluster=single_gpu", "rollout.tensor_parallel_size=2").engine == 2.0


def test_a_cpu_has_none_to_share(tmp_path: Path) -> None:
    assert shares(tmp_path) == GpuShares(0.0, 0.0, 0.0, 0.0)
    with pytest.raises(ConfigError, match=r"placement=apart: has no effect with cluster.device=cpu"):
        shares(tmp_path, "cluster.placement=apart")
