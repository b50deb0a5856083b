"""`rollout.engine` reaches real vLLM, whose refusals name it; nothing that rlkit sets can be set twice."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray_fixture import ray_session  # noqa: F401
from rollout_host import OpenWorker
from test_in_flight import distance, model, opened, policies, publish, run, sampled, samples_of  # noqa: F401

from rlkit.config.engine import FIXED, FIXED_ON_CPU, OWNED
from rlkit.config.schema import RolloutConfig
from rlkit.experience import UserError
from rlkit.learner.policy import PolicyLearner
from rlkit.rollout.engine import engine_arguments

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


def test_engines_on_gpus_keep_what_makes_vllm_fast() -> None:
    """CUDA graphs, and its own choice of scheduling and of how much to prefill at a time."""
    from vllm.engine.arg_utils import EngineArgs

    on_gpu, on_cpu = (
        engine_arguments(
            "model", RolloutConfig(), device=device, seed=0, trust_remote_code=False, route="nccl", sleeps=False
        )
        for device in ("cuda", "cpu")
    )
    assert on_gpu["enforce_eager"] is False and on_cpu["enforce_eager"] is True
    assert on_gpu["dtype"] == "bfloat16" and on_cpu["dtype"] == "float32"
    assert "gpu_memory_utilization" in on_gpu
    assert not {*FIXED_ON_CPU, "async_scheduling"} & set(on_gpu)
    assert set(on_gpu) <= {field.name for field in dataclasses.fields(EngineArgs)}


@pytest.mark.slow
@pytest.mark.parametrize("seeds", ["auto", "never"])
def test_samples_repeat_where_they_have_seeds(
    ray_session: None,  # noqa: F811
    model: Path,  # noqa: F811
    policies: list[PolicyLearner],  # noqa: F811
    tmp_path: Path,
    seeds: str,
) -> None:
    with opened(model, tmp_path, sample_seeds=seeds) as pool:
        run(publish(pool, policies[0], 0))
        first, second = (samples_of(run(sampled(pool))) for _ in range(2))
        same = [a.token_ids.tolist() == b.token_ids.tolist() for (_, a), (_, b) in zip(first, second, strict=True)]
        assert all(same) if seeds == "auto" else not any(same)
        for group, sample in (*first, *second):
            assert distance(group, sample, policies).max() < 1e-4


class ListeningWorker(OpenWorker):
    """Use through Ray. Remembers what its engine was made of."""

    def _load(self) -> None:
        from vllm.engine import arg_utils

        engine_args, self.arguments = arg_utils.EngineArgs, {}

        def listening(**arguments: Any) -> Any:
            self.arguments = arguments
            return engine_args(**arguments)

        arg_utils.EngineArgs = listening  # type: ignore[misc, assignment]
        try:
            super()._load()
        finally:
            arg_utils.EngineArgs = engine_args  # type: ignore[misc]

    async def names(self) -> list[str]:
        return sorted(self.arguments)


@pytest.mark.slow
@pytest.mark.skipif(not torch.cpu._is_avx512_supported(), reason="vLLM computes in eight bits with AVX-512")
@pytest.mark.parametrize(
    ("argument", "dtype"), [({"kv_cache_dtype": "fp8"}, "auto"), ({"quantization": "fp8_per_channel"}, "bfloat16")]
)
def test_coarse_engines_take_new_weights_and_show_beside_the_learner(
    ray_session: None,  # noqa: F811
    model: Path,  # noqa: F811
    policies: list[PolicyLearner],  # noqa: F811
    tmp_path: Path,
    argument: dict[str, str],
    dtype: str,
) -> None:
    with opened(model, tmp_path, ListeningWorker, engine=argument, dtype=dtype) as pool:
        names = set(run(pool.workers[0].names.remote()))
        assert names - {*OWNED, *FIXED, *FIXED_ON_CPU} == {*argument}, "two places would set the same"
        for version in (0, 1):
            run(publish(pool, policies[version], version))
            off = np.concatenate([distance(g, s, policies) for g, s in samples_of(run(sampled(pool)))])
            assert 0.002 < off.mean() < 0.1


@pytest.mark.slow
def test_what_vllm_refuses_is_said(ray_session: None, model: Path, tmp_path: Path) -> None:  # noqa: F811
    refusal = r"rollout\.engine: vLLM does not start with \{'kv_cache_dtype': 'fp9'\}"
    with pytest.raises(UserError, match=refusal), opened(model, tmp_path, engine={"kv_cache_dtype": "fp9"}):
        pass
