"""New weights between two steps of the engine, on real vLLM: what runs goes on, and every token knows its version."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from learner_fixture import VOCABULARY, build_learner, write_tiny_model, write_tokenizer
from ray_fixture import ray_session  # noqa: F401
from rollout_host import OpenWorker

from rlkit.config.schema import ClusterConfig, RolloutConfig, RunConfig, TrainerConfig
from rlkit.experience import Group, Message, Prompt, Sample
from rlkit.learner.policy import PolicyLearner
from rlkit.rollout.pool import RolloutPool
from rlkit.rollout.requests import GroupRequest
from rlkit.weights.bundle import WeightBundle
from rlkit.weights.publication import Agreement, Published

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]
T = TypeVar("T")
CANARY = ((5, 6, 7, 8, 9, 10), (30, 40, 50), (11, 9, 7, 5, 3))
RESPONSE = 160
SAMPLES = 4


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(coroutine, 120))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(write_tiny_model(tmp_path_factory.mktemp("policy"), initializer_range=0.1))


@pytest.fixture(scope="module")
def policies(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[PolicyLearner]:
    """The pool's first one, and another of the same shape."""
    other = write_tiny_model(tmp_path_factory.mktemp("other"), seed=1, initializer_range=0.1)
    return [build_learner(model), build_learner(other)]


@pytest.fixture
def pool(ray_session: None, model: Path, tmp_path: Path) -> Iterator[RolloutPool]:  # noqa: F811
    import ray

    config = RunConfig(
        run_dir=Path("unused"),
        trainer=TrainerConfig(max_staleness=2),
        cluster=ClusterConfig(threads_per_actor=1),
        rollout=RolloutConfig(
            workers=2, max_prompt_tokens=40, max_response_tokens=RESPONSE, max_concurrent_samples=16, memory_gib=0.1
        ),
        algorithm={},
        reward={},
        data={},
        verifier={},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlkit.rollout.pool.RolloutWorker", OpenWorker)
        pool = RolloutPool(config, str(model), tmp_path)
        run(pool.start())
        yield pool
    for worker in pool.workers:
        ray.kill(worker)


def requests(count: int = 4) -> list[GroupRequest]:
    rng = np.random.default_rng(0)
    prompts = [tuple(rng.integers(3, VOCABULARY, 20).tolist()) for _ in range(count)]
    return [
        GroupRequest(f"{i:08d}", Prompt(f"p{i}", (Message("user", "?"),), ids), SAMPLES, seed=7, step=1)
        for i, ids in enumerate(prompts)
    ]


async def sampled(pool: RolloutPool) -> list[Group]:
    groups = [group async for ref in pool.generate(requests()) for group in await ref]
    return sorted(groups, key=lambda group: group.id)


async def publish(pool: RolloutPool, policy: PolicyLearner, version: int) -> Agreement:
    bundle = WeightBundle.pack(version, policy.named_weights())
    pool.announce(Published(bundle, version, CANARY, policy.canary_logprobs(CANARY)))
    return await pool.confirm({})


async def sampled_while(pool: RolloutPool, policies: Sequence[PolicyLearner]) -> tuple[list[Group], int]:
    """Groups, and the last version of weights that came meanwhile: the policies' in turn."""
    sampling, version = asyncio.create_task(sampled(pool)), 0
    while not sampling.done():
        version += 1
        agreement = await publish(pool, policies[version % len(policies)], version)
        assert agreement.difference < 1e-3
    return await sampling, version


def samples_of(groups: Sequence[Group]) -> list[tuple[Group, Sample]]:
    return [(group, sample) for group in groups for sample in group.samples]


def test_equal_weights_leave_every_bit(pool: RolloutPool, policies: list[PolicyLearner]) -> None:
    undisturbed = run(sampled(pool))
    disturbed, last = run(sampled_while(pool, policies[:1]))
    assert last > 1
    assert any(sample.versions is not None for _, sample in samples_of(disturbed)), "no weights came in mid-flight"
    for (_, before), (_, after) in zip(samples_of(undisturbed), samples_of(disturbed), strict=True):
        assert before.token_ids.tolist() == after.token_ids.tolist()
        assert before.sampled.tobytes() == after.sampled.tobytes()


def test_every_token_has_the_logprob_of_its_version(pool: RolloutPool, policies: list[PolicyLearner]) -> None:
    run(publish(pool, policies[0], 0))
    groups, last = run(sampled_while(pool, policies))
    mixed = 0
    for group, sample in samples_of(groups):
        assert sample.policy_versions[1] <= last
        versions = np.full(len(sample), sample.policy_versions[0]) if sample.versions is None else sample.versions
        assert (versions[0], versions[-1]) == sample.policy_versions
        assert (np.diff(versions) >= 0).all()
        mixed += sample.versions is not None
        sequence = ((*group.prompt.token_ids, *sample.token_ids.tolist()),)
        by_policy = np.stack([policy.canary_logprobs(sequence)[-len(sample) :] for policy in policies])
        expected = by_policy[versions % 2, np.arange(len(sample))]
        np.testing.assert_allclose(sample.sampled, expected, atol=1e-4)
    assert mixed > SAMPLES, "hardly any sample lived through new weights"


@pytest.mark.parametrize("when", ["frozen", "unproved"])
def test_an_engine_that_dies_while_weights_come_loses_nothing(
    pool: RolloutPool, policies: list[PolicyLearner], when: str
) -> None:
    async def steps() -> list[Group]:
        sampling = asyncio.create_task(sampled(pool))
        await asyncio.sleep(0.2)
        worker = pool.workers[0]
        pid = await worker.pid.remote()
        await worker.prepare.remote()
        if when == "unproved":
            await worker.take.remote(WeightBundle.pack(1, policies[0].named_weights()))
            await worker.confirm.remote(CANARY)
        os.kill(pid, signal.SIGKILL)
        await publish(pool, policies[0], 1)
        return await sampling

    async def published_first() -> list[Group]:
        await publish(pool, policies[0], 0)
        return await sampled(pool)

    undisturbed, disturbed = run(published_first()), run(steps())
    for (_, before), (_, after) in zip(samples_of(undisturbed), samples_of(disturbed), strict=True):
        assert before.token_ids.tolist() == after.token_ids.tolist()
        assert before.sampled.tobytes() == after.sampled.tobytes()


def test_places_are_counted_and_waited_for(pool: RolloutPool) -> None:
    async def steps() -> None:
        assert await pool.places(SAMPLES) == 8
        assert await pool.places(100) == 2, "a group larger than an engine must have a place, too"
        stream = pool.generate(requests(8))
        first = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        waiting = asyncio.create_task(pool.places(SAMPLES))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        await first
        assert await waiting >= 1
        async for _ in stream:
            pass
        assert await pool.places(SAMPLES) == 8

    run(steps())
