"""Adapters alone on their way into a real vLLM engine: what it samples with, and the proof of it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from adapter_fixture import need
from learner_fixture import (
    VOCABULARY,
    WholeLearner,
    build_learner,
    grpo_advantages,
    make_groups,
    write_tiny_model,
    write_tokenizer,
)
from ray_fixture import ray_session, run  # noqa: F401
from rollout_host import OpenWorker

from rlkit.config.lora import LoraConfig
from rlkit.config.schema import ClusterConfig, ModelConfig, RolloutConfig, RunConfig, TrainerConfig
from rlkit.experience import Group, Message, Prompt, UserError
from rlkit.rollout.adapter import EngineAdapter
from rlkit.rollout.pool import RolloutPool
from rlkit.rollout.requests import GroupRequest
from rlkit.weights.bundle import WeightBundle
from rlkit.weights.publication import Agreement, Proof, Published, WeightReceipt, WeightsNotLoadedError

need("peft", "lora")
pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.usefixtures("ray_session")]
CANARY = ((5, 6, 7, 8, 9, 10), (30, 40, 50), (11, 9, 7, 5, 3))
LORA = LoraConfig(rank=4, publish="adapter", target_modules=("q_proj", "v_proj", "o_proj", "down_proj"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(write_tiny_model(tmp_path_factory.mktemp("policy"), initializer_range=0.1))


@pytest.fixture(scope="module")
def policies(model: Path) -> list[WholeLearner]:
    """One whose adapter changes nothing yet, and one that has learnt."""
    torch.manual_seed(1)
    new, trained = (build_learner(model, lora=LORA, learning_rate=0.1) for _ in range(2))
    groups = make_groups()
    trained.update(groups, grpo_advantages(groups))
    return [new, trained]


@pytest.fixture(scope="module")
def pool(ray_session: None, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RolloutPool]:  # noqa: F811
    import ray

    config = RunConfig(
        run_dir=Path("unused"),
        model=ModelConfig(path=str(model), lora=LORA),
        trainer=TrainerConfig(max_staleness=2),
        cluster=ClusterConfig(threads_per_actor=1),
        rollout=RolloutConfig(max_prompt_tokens=40, max_response_tokens=100, max_concurrent_samples=16, memory_gib=0.1),
        algorithm={},
        reward={},
        data={},
        verifier={},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlkit.rollout.worker.RolloutWorker", OpenWorker)
        pool = RolloutPool(config, str(model), tmp_path_factory.mktemp("logs"))
        run(pool.start())
        yield pool
    for worker in pool.workers:
        ray.kill(worker)


def published(policy: WholeLearner, version: int) -> Published:
    bundle = WeightBundle.pack(version, policy.adapter_weights())
    return Published(bundle, version, CANARY, policy.canary_logprobs(CANARY))


async def publish(pool: RolloutPool, policy: WholeLearner, version: int) -> Agreement:
    pool.announce(published(policy, version))
    return await pool.confirm({})


async def sampled(pool: RolloutPool) -> list[Group]:
    rng = np.random.default_rng(0)
    prompts = [tuple(rng.integers(3, VOCABULARY, 20).tolist()) for _ in range(4)]
    requests = [
        GroupRequest(f"{i:08d}", Prompt(f"p{i}", (Message("user", "?"),), ids), 4, seed=7, step=1)
        for i, ids in enumerate(prompts)
    ]
    return [group async for ref in pool.generate(requests) for group in await ref]


def test_every_token_has_the_logprob_of_the_adapter_that_gave_it(
    pool: RolloutPool, policies: list[WholeLearner]
) -> None:
    """Adapters come in turn while the engine samples."""

    async def steps() -> list[Group]:
        await publish(pool, policies[0], 0)
        sampling, version = asyncio.create_task(sampled(pool)), 0
        while not sampling.done():
            version += 1
            agreement = await publish(pool, policies[version % 2], version)
            assert agreement.difference < 1e-4
        return await sampling

    assert np.abs(np.subtract(*(policy.canary_logprobs(CANARY) for policy in policies))).max() > 0.05
    mixed = 0
    for group in run(steps()):
        for sample in group.samples:
            versions = np.full(len(sample), sample.policy_versions[0]) if sample.versions is None else sample.versions
            mixed += sample.versions is not None
            sequence = ((*group.prompt.token_ids, *sample.token_ids.tolist()),)
            by_policy = np.stack([policy.canary_logprobs(sequence)[-len(sample) :] for policy in policies])
            expected = by_policy[versions % 2, np.arange(len(sample))]
            np.testing.assert_allclose(sample.sampled, expected, atol=1e-4)
    assert mixed, "no sample lived through a new adapter"


def test_an_engine_that_keeps_an_old_adapter_is_found(pool: RolloutPool, policies: list[WholeLearner]) -> None:
    worker, proof = pool.workers[0], Proof()

    async def receipt(version: int, old: bool = False) -> tuple[Published, WeightReceipt]:
        news = published(policies[version % 2], version)
        await worker.prepare.remote()
        await (worker.take_and_keep_old if old else worker.take).remote(news.bundle)
        return news, await worker.confirm.remote(CANARY)

    async def steps() -> list[tuple[Published, WeightReceipt]]:
        return [await receipt(0), await receipt(1), await receipt(2, old=True)]

    first, second, kept = run(steps())
    for news, found in (first, second):
        assert found.loaded is not None and not found.loaded.unwritten
        assert proof.accept("worker 0", news, found, None, 1e-3).difference < 1e-4
    with pytest.raises(WeightsNotLoadedError, match="unchanged to the last bit: it kept the old weights"):
        proof.accept("worker 0", *kept, None, 1e-3)


def test_a_model_that_vllm_runs_without_adapters_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    with pytest.raises(UserError, match=r"adapters for GPT2LMHeadModel: use model\.lora\.publish=merged"):
        EngineAdapter(LORA).options(str(tmp_path))
