"""GPUs that actors ask for: sums that fit, and nothing on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from rewards.code.reward import CodeReward
from rewards.remote import RemoteReward
from rlkit.config.loading import load_config
from rlkit.config.messages import ConfigError
from rlkit.config.plan import GpuShares, colocated_slots, gpu_shares

URLS = "reward.urls=[http://127.0.0.1:30000]"
ON_GPU = {
    "rule": (False, "reward=rule"),
    "length": (False, "reward=length", "reward.max_tokens=20"),
    "group_length": (False, "reward=group_length"),
    "repetition": (False, "reward=repetition"),
    "format": (False, "reward=format"),
    "judge": (False, "reward=judge", "reward.base_url=http://127.0.0.1:1/v1", "reward.model=m"),
    "polar": (True, "reward=polar"),
    "polar_vllm": (True, "reward=polar", "reward.backend=vllm"),
    "polar_http_vllm": (False, "reward=polar", "reward.backend=http_vllm", URLS),
    "polar_http_sglang": (False, "reward=polar", "reward.backend=http_sglang", URLS),
    "preference": (True, "reward=preference", "reward.model_path=embedded:polar", "reward.layout=pair"),
    "implicit_prm": (True, "reward=implicit_prm", "algorithm=prime"),
    "function": (True, "reward=function", "reward.function=reward_functions.words"),
    "rules": (False, "reward=[rule,length]", "reward.parts.length.max_tokens=20"),
    "rule_and_model": (True, "reward=[rule,polar]"),
}
"""Reward -> whether it has a share of a GPU."""


def shares(tmp_path: Path, *overrides: str) -> GpuShares:
    return gpu_shares(load_config(["reward=polar", f"run_dir={tmp_path / 'run'}", *overrides], elsewhere=()).config)


@pytest.mark.parametrize("name", ON_GPU)
def test_only_rewards_that_load_a_model_have_a_share(name: str, tmp_path: Path) -> None:
    uses, *overrides = ON_GPU[name]
    for placement, share in (("colocated", 0.1), ("apart", 1.0)):
        chosen = (*overrides, "cluster=single_gpu", f"cluster.placement={placement}")
        assert shares(tmp_path, *chosen).rewards == (share if uses else 0.0)


def test_rewards_on_servers_and_in_sandboxes_have_none() -> None:
    """Asked of the class: a configuration with reward=remote is valid only while its server answers."""
    assert not RemoteReward.traits(RemoteReward.Config(url="http://127.0.0.1:1")).uses_gpu  # type: ignore[call-arg]
    for isolation in ({"isolation": "bubblewrap"}, {"isolation": "http", "url": "http://127.0.0.1:1"}):
        assert not CodeReward.traits(CodeReward.Config(**isolation)).uses_gpu  # type: ignore[arg-type]


def test_all_that_is_colocated_fits_on_one_gpu(tmp_path: Path) -> None:
    one = shares(tmp_path, "cluster=single_gpu")
    assert one.engine + one.learner + one.critic + one.rewards == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("workers", "width", "ranks", "critics", "places"),
    [(1, 1, 1, 0, 1), (4, 1, 8, 0, 8), (8, 1, 4, 0, 8), (1, 4, 4, 0, 4), (2, 2, 1, 0, 4), (1, 1, 1, 3, 3)],
)
def test_every_gpu_of_an_engine_and_every_rank_has_a_place(
    tmp_path: Path, workers: int, width: int, ranks: int, critics: int, places: int
) -> None:
    overrides = (f"rollout.workers={workers}", f"rollout.tensor_parallel_size={width}", f"learner.ranks={ranks}")
    config = load_config(["reward=polar", f"run_dir={tmp_path / 'run'}", "cluster=single_gpu", *overrides]).config
    assert colocated_slots(config, critics) == places
    assert gpu_shares(config).engine == 0.5  # on each of its GPUs


def test_apart_means_whole_gpus(tmp_path: Path) -> None:
    apart = shares(tmp_path, "cluster=single_gpu", "cluster.placement=apart", "rollout.tensor_parallel_size=4")
    assert apart == GpuShares(4.0, 1.0, 1.0, 1.0)


def test_a_cpu_has_none_to_share(tmp_path: Path) -> None:
    assert shares(tmp_path) == GpuShares(0.0, 0.0, 0.0, 0.0)
    with pytest.raises(ConfigError, match=r"placement=apart: has no effect with cluster.device=cpu"):
        shares(tmp_path, "cluster.placement=apart")
