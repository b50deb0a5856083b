"""Weights from two learner ranks (ZeRO 3) to two vLLM engines over gloo: the protocol of NCCL, on CPUs; and the turns.

On a CPU vLLM's sleep frees nothing, but its states and order are those of a GPU, and so are DeepSpeed's.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from learner_fixture import VOCABULARY, grpo_advantages, make_groups, write_tiny_model, write_tokenizer
from ray_fixture import ray_session, run  # noqa: F401
from rollout_host import OpenRank, OpenWorker, publish_bundle

from algorithms.base import POLICY, Experience
from algorithms.grpo import GRPO
from rewards.base import RewardContext
from rlkit.config.schema import ClusterConfig, LearnerConfig, RolloutConfig, RunConfig
from rlkit.experience import Group, Message, Prompt
from rlkit.learner.actors import LearnerGroup
from rlkit.learner.joint import JointLearner
from rlkit.rollout.pool import RolloutPool
from rlkit.rollout.requests import GroupRequest
from rlkit.serving.pool import RewardPool
from rlkit.weight_sync import WeightSync
from rlkit.weights.publication import Published, WeightsNotLoadedError

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.usefixtures("ray_session")]
CANARY = ((5, 6, 7, 8, 9, 10), (30, 40, 50), (11, 9, 7, 5, 3))
WORKERS = 2


@pytest.fixture(scope="module")
def sync(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WeightSync]:  # noqa: F811
    """Two ranks that offload between phases, two engines; every test leaves them after `publish`."""
    yield from standing(tmp_path_factory)


@pytest.fixture
def own_sync(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WeightSync]:  # noqa: F811
    """For a test after which it is of no use."""
    yield from standing(tmp_path_factory)


def standing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WeightSync]:
    """Everything has loaded and version 0 is published."""
    import ray

    folder, logs = tmp_path_factory.mktemp("policy"), tmp_path_factory.mktemp("logs")
    model = str(write_tokenizer(write_tiny_model(folder, initializer_range=0.3)))
    cluster = ClusterConfig(threads_per_actor=1, weight_transfer="gloo")
    config = RunConfig(
        run_dir=Path("unused"),
        # Less than a MiB, or the tiny model would be one bucket.
        cluster=cluster.model_copy(update={"weight_bucket_mib": 1 / 32}),
        rollout=RolloutConfig(
            workers=WORKERS, max_prompt_tokens=100, max_response_tokens=24, max_concurrent_samples=16, memory_gib=0.1
        ),
        learner=LearnerConfig(learning_rate=1e-2, dtype="float32", ranks=2, zero_stage=3, offload="always"),
        algorithm={},
        reward={},
        data={},
        verifier={},
    )
    algorithm = GRPO(GRPO.Config(samples_per_prompt=4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlkit.rollout.worker.RolloutWorker", OpenWorker)  # also those that replace dead ones
        patch.setattr("rlkit.learner.actors.LearnerWorker", OpenRank)
        pool = RolloutPool(config, model, logs)
        learner = LearnerGroup(config, model, algorithm, logs)
        reward = RewardPool({"_target_": "rewards.verifiers.math.MathReward"}, RewardContext(), 60.0)
        sync = WeightSync(
            config, pool, JointLearner(algorithm, learner, None, config.critic, lambda messages: ()), reward, CANARY
        )
        sync.sleeps = True  # vLLM refuses the option on a CPU, and ignores the calls but for their order

        async def start() -> None:
            await asyncio.gather(pool.start(), learner.start())
            await pool.sleep(2)
            assert (await sync.publish(0))["weights/canary_difference"] < 1e-3

        run(start())
        yield sync
    for actor in [*pool.workers, *learner.ranks]:
        ray.kill(actor)


def request(name: str, seed: int = 7) -> GroupRequest:
    tokens = np.random.default_rng(seed).integers(3, VOCABULARY, 9).tolist()
    return GroupRequest(
        id=name, prompt=Prompt(name, (Message("user", "?"),), tuple(tokens)), samples=4, seed=seed, step=1
    )


async def groups_of(stream: AsyncIterator[Any]) -> list[Group]:
    return sorted([group async for ref in stream for group in await ref], key=lambda group: group.id)


def requests(count: int = 6) -> list[GroupRequest]:
    return [request(f"g{i}", i) for i in range(count)]


async def train(sync: WeightSync, seed: int) -> None:
    """Another policy."""
    await sync.release_sampler()
    groups = make_groups(seed=seed)
    await sync.learner.policy.update(Experience(groups, 1), grpo_advantages(groups))


async def version_of(sync: WeightSync) -> int:
    """Of the policy on the learner."""
    return (await sync.learner.policy.publishable(())[1])[0]


def sampled_as_the_learner(groups: Sequence[Group], learners: Sequence[np.ndarray]) -> bool:
    sampled = [sample.logprobs for group in groups for sample in group.samples]
    return max(float(np.abs(a - b).max()) for a, b in zip(sampled, learners, strict=True)) < 1e-3


def test_engines_sample_from_what_was_sent_and_groups_wait_for_it(sync: WeightSync) -> None:
    async def steps() -> None:
        before = await groups_of(sync.rollout.generate(requests()))
        await train(sync, 1)
        version = await version_of(sync)
        assert (await sync.publish(version))["weights/canary_difference"] < 1e-3
        after = await groups_of(sync.rollout.generate(requests()))
        assert {sample.policy_versions for group in after for sample in group.samples} == {(version, version)}
        assert [s.text for g in before for s in g.samples] != [s.text for g in after for s in g.samples]
        assert sync.learner.policy.offloaded
        await sync.release_sampler()
        assert not sync.learner.policy.offloaded
        logprobs = await sync.learner.policy.logprobs(after, POLICY)
        assert sampled_as_the_learner(after, logprobs)
        assert not sampled_as_the_learner(before, await sync.learner.policy.logprobs(before, POLICY))
        await sync.publish(version)

    run(steps())


def test_both_ways_bring_the_same_bits(sync: WeightSync) -> None:
    """What was sent in buckets samples as what came whole through the object store."""

    async def steps() -> tuple[list[Group], list[Group]]:
        pool = sync.rollout
        in_buckets = await groups_of(pool.generate(requests()))
        bundle, proof = sync.learner.policy.publishable(())
        version, _ = await proof
        await publish_bundle(pool, Published(bundle, version, CANARY, sync._wanted))
        return in_buckets, await groups_of(pool.generate(requests()))

    for one, two in zip(*run(steps()), strict=True):
        for a, b in zip(one.samples, two.samples, strict=True):
            assert a.token_ids.tolist() == b.token_ids.tolist()
            assert np.array_equal(a.logprobs, b.logprobs)


def test_a_checkpoint_is_made_in_between(sync: WeightSync, tmp_path: Path) -> None:
    """Engines sample afterwards, also when it fails."""

    async def fails() -> None:
        raise OSError("the disk is full")

    async def steps() -> tuple[list[Group], list[Group]]:
        before = await groups_of(sync.rollout.generate(requests()))
        counters, written = await sync.with_learner_memory(sync.learner.save_state(tmp_path))
        assert counters["learner"]["version"] == await version_of(sync)
        assert [file.path for file in written] == [tmp_path / "learner.safetensors"]
        assert sync.learner.policy.offloaded
        with pytest.raises(OSError, match="disk is full"):
            await sync.with_learner_memory(fails())
        assert sync.learner.policy.offloaded
        return before, await groups_of(sync.rollout.generate(requests()))

    before, after = run(steps())
    assert (tmp_path / "learner.safetensors").is_file()
    assert [s.token_ids.tolist() for g in before for s in g.samples] == [
        s.token_ids.tolist() for g in after for s in g.samples
    ]


def test_weights_that_arrive_damaged_everywhere_end_the_run(sync: WeightSync) -> None:
    async def steps() -> None:
        await train(sync, 3)
        version = await version_of(sync)
        await sync.learner.policy.ranks[0].damage_next.remote()
        with pytest.raises(WeightsNotLoadedError, match=rf"worker [01]: weights of version {version} arrived damaged"):
            await sync.publish(version)
        assert [health.restarts for health in sync.rollout.health] == [0] * WORKERS
        await sync.release_sampler()
        assert (await sync.publish(version))["weights/canary_difference"] < 1e-3

    run(steps())


def test_a_version_that_is_not_the_learners_is_not_sent_as_such(sync: WeightSync) -> None:
    async def steps() -> None:
        await sync.release_sampler()
        version = await version_of(sync)
        with pytest.raises(ValueError, match=f"the learner's weights are of version {version}, not {version + 1}"):
            await sync.publish(version + 1)
        await sync.publish(version)

    run(steps())


def test_a_worker_whose_weights_arrive_damaged_is_replaced_and_given_them_anew(
    sync: WeightSync, caplog: pytest.LogCaptureFixture
) -> None:
    async def steps() -> None:
        await train(sync, 4)
        version, restarts = await version_of(sync), sync.rollout.health[1].restarts
        await sync.rollout.workers[1].damage_next.remote()
        assert (await sync.publish(version))["weights/canary_difference"] < 1e-3
        assert sync.rollout.health[1].restarts == restarts + 1
        assert [health.may_sample(version) for health in sync.rollout.health] == [True] * WORKERS
        sampled = await groups_of(sync.rollout.generate(requests()))
        await sync.release_sampler()
        assert sampled_as_the_learner(sampled, await sync.learner.policy.logprobs(sampled, POLICY))
        await sync.publish(version)

    run(steps())
    assert "rollout worker 1: weights of version" in caplog.text
    assert "arrived damaged" in caplog.text


async def kill(sync: WeightSync, index: int) -> None:
    os.kill(await sync.rollout.workers[index].pid.remote(), signal.SIGKILL)


def test_a_worker_that_dies_between_steps_is_replaced_and_meets_the_learner_again(sync: WeightSync) -> None:
    async def steps() -> None:
        undisturbed = await groups_of(sync.rollout.generate(requests()))
        version = await version_of(sync)
        await sync.release_sampler()
        await kill(sync, 0)
        await sync.publish(version)  # to one worker directly; the new one gets a bundle
        assert [health.may_sample(version) for health in sync.rollout.health] == [True] * WORKERS
        assert sync.rollout.health[0].restarts == 1
        again = await groups_of(sync.rollout.generate(requests()))
        assert [s.token_ids.tolist() for g in again for s in g.samples] == [
            s.token_ids.tolist() for g in undisturbed for s in g.samples
        ]
        await train(sync, 2)
        assert (await sync.publish(version + 1))["weights/canary_difference"] < 1e-3  # to both directly

    run(steps())


def test_a_worker_that_dies_while_sampling_gets_the_present_weights(sync: WeightSync) -> None:
    async def steps() -> None:
        undisturbed = await groups_of(sync.rollout.generate(requests(40)))
        version, restarts = await version_of(sync), sync.rollout.health[1].restarts
        groups: list[Group] = []
        async for ref in sync.rollout.generate(requests(40)):
            if not groups:
                await kill(sync, 1)
            groups += await ref
        assert sync.rollout.health[1].restarts == restarts + 1
        assert {sample.policy_versions[0] for group in groups for sample in group.samples} == {version}
        groups.sort(key=lambda group: group.id)
        assert [s.token_ids.tolist() for g in groups for s in g.samples] == [
            s.token_ids.tolist() for g in undisturbed for s in g.samples
        ]

    run(steps())


def test_a_worker_that_dies_during_a_transfer_ends_the_run_at_once(sync: WeightSync) -> None:
    """Last: the learner may wait for ever for what it cannot send."""

    async def steps() -> float:
        await sync.release_sampler()
        version, pool = await version_of(sync), sync.rollout
        pid = await pool.workers[1].pid.remote()
        ready = await pool.prepare(Published(None, version, CANARY, sync._wanted))
        os.kill(pid, signal.SIGSTOP)
        sending = asyncio.ensure_future(sync._send(ready, version))
        await asyncio.sleep(1.0)
        assert not sending.done()
        os.kill(pid, signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(WeightsNotLoadedError, match=r"rollout worker 1 died while .* resume=auto continues"):
            await sending
        return time.monotonic() - began

    assert run(steps()) < 30


def test_an_engine_that_fails_during_a_transfer_ends_the_run_at_once_with_the_cause(own_sync: WeightSync) -> None:
    """Rank 0 then waits in its broadcast for a receiver that lives and does not come."""

    async def steps() -> float:
        sync = own_sync
        await train(sync, 5)
        version = await version_of(sync)
        await sync.rollout.workers[1].break_transfer.remote("update_weights")
        began = time.monotonic()
        said = r"rollout worker 1 failed while .* sending it weights.*: MemoryError: no room for update_weights\. Its"
        with pytest.raises(WeightsNotLoadedError, match=said):
            await sync.publish(version)
        return time.monotonic() - began

    assert run(steps()) < 30
