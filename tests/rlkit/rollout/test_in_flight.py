"""New weights between two steps of the engine, on real vLLM: what runs goes on, and every token knows its version."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from learner_fixture import VOCABULARY, build_learner, write_tiny_model, write_tokenizer
from ray_fixture import ray_session, run  # noqa: F401
from rollout_host import OpenWorker

from rlkit.config.schema import ClusterConfig, RolloutConfig, RunConfig, TrainerConfig
from rlkit.experience import Group, Message, Prompt, Sample
from rlkit.learner.policy import PolicyLearner
from rlkit.rollout.pool import RolloutPool
from rlkit.rollout.requests import GroupRequest, Request
from rlkit.weights.bundle import WeightBundle
from rlkit.weights.publication import Agreement, Published

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]
CANARY = ((5, 6, 7, 8, 9, 10), (30, 40, 50), (11, 9, 7, 5, 3))
RESPONSE = 160
SAMPLES = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(write_tiny_model(tmp_path_factory.mktemp("policy"), initializer_range=0.1))


@pytest.fixture(scope="module")
def policies(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[PolicyLearner]:
    """The pool's first one, and another of the same shape."""
    other = write_tiny_model(tmp_path_factory.mktemp("other"), seed=1, initializer_range=0.1)
    return [build_learner(model), build_learner(other)]


@contextmanager
def opened(model: Path, logs: Path, worker: type[OpenWorker] = OpenWorker, **options: Any) -> Iterator[RolloutPool]:
    import ray

    sizes = {"max_prompt_tokens": 40, "max_response_tokens": RESPONSE, "max_concurrent_samples": 16, "memory_gib": 0.1}
    config = RunConfig(
        run_dir=Path("unused"),
        trainer=TrainerConfig(max_staleness=2),
        cluster=ClusterConfig(threads_per_actor=1),
        rollout=RolloutConfig(**{**sizes, **options}),
        algorithm={},
        reward={},
        data={},
        verifier={},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlkit.rollout.worker.RolloutWorker", worker)
        pool = RolloutPool(config, str(model), logs)
        run(pool.start())
        yield pool
    for actor in pool.workers:
        ray.kill(actor)


@pytest.fixture(scope="module")
def pool(ray_session: None, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RolloutPool]:  # noqa: F811
    with opened(model, tmp_path_factory.mktemp("logs"), workers=2) as pool:
        yield pool


def requests(count: int = 4, length: int = 20) -> list[GroupRequest]:
    rng = np.random.default_rng(0)
    prompts = [tuple(rng.integers(3, VOCABULARY, length).tolist()) for _ in range(count)]
    return [
        GroupRequest(f"{i:08d}", Prompt(f"p{i}", (Message("user", "?"),), ids), SAMPLES, seed=7, step=1)
        for i, ids in enumerate(prompts)
    ]


async def sampled(pool: RolloutPool, count: int = 4, length: int = 20) -> list[Group]:
    groups = [group async for ref in pool.generate(requests(count, length)) for group in await ref]
    return sorted(groups, key=lambda group: group.id)


async def publish(pool: RolloutPool, policy: PolicyLearner, version: int) -> Agreement:
    bundle = WeightBundle.pack(version, policy.named_weights())
    pool.announce(Published(bundle, version, CANARY, policy.canary_logprobs(CANARY)))
    return await pool.confirm({})


async def sampled_while(
    pool: RolloutPool, policies: Sequence[PolicyLearner], count: int = 4, length: int = 20
) -> tuple[list[Group], int]:
    """Groups, and the last version of weights that came meanwhile: the policies' in turn."""
    sampling, version = asyncio.create_task(sampled(pool, count, length)), 0
    while not sampling.done():
        version += 1
        agreement = await publish(pool, policies[version % len(policies)], version)
        assert agreement.difference < 1e-3
        await asyncio.sleep(0.1)  # a full engine proves its weights between two tokens: else they would come as often
    return await sampling, version


def samples_of(groups: Sequence[Group]) -> list[tuple[Group, Sample]]:
    return [(group, sample) for group in groups for sample in group.samples]


def test_equal_weights_leave_every_bit(pool: RolloutPool, policies: list[PolicyLearner]) -> None:
    run(publish(pool, policies[0], 0))
    undisturbed = run(sampled(pool))
    began = time.monotonic()
    disturbed, last = run(sampled_while(pool, policies[:1]))
    times, passed = pool.times(), time.monotonic() - began
    assert 0 < times["time/frozen"] < passed and 0 <= times["time/engine_idle"] < passed  # of the last weights
    assert last > 1
    assert any(sample.versions is not None for _, sample in samples_of(disturbed)), "no weights came in mid-flight"
    for (_, before), (_, after) in zip(samples_of(undisturbed), samples_of(disturbed), strict=True):
        assert before.token_ids.tolist() == after.token_ids.tolist()
        assert before.sampled.tobytes() == after.sampled.tobytes()


def test_a_full_engine_proves_its_weights_at_once(pool: RolloutPool, policies: list[PolicyLearner]) -> None:
    """Not when one of its responses has ended, for which the learner would wait."""

    async def while_full() -> tuple[int, int]:
        await publish(pool, policies[0], 0)
        sampling = asyncio.create_task(sampled(pool, count=12))  # 24 responses for each engine of 16 places
        waiting = 0
        while not waiting:
            waiting, steps = await pool.workers[0].steps_until_canary.remote(CANARY)
        assert not sampling.done()
        await sampling
        return waiting, steps

    waiting, steps = run(while_full())
    assert waiting and steps <= 2


def versions_of(sample: Sample) -> np.ndarray:
    """[T]"""
    return np.full(len(sample), sample.policy_versions[0]) if sample.versions is None else sample.versions


def distance(group: Group, sample: Sample, policies: Sequence[PolicyLearner]) -> np.ndarray:
    """[T]: of the recorded log-probs from those of the versions that they name."""
    sequence = ((*group.prompt.token_ids, *sample.token_ids.tolist()),)
    by_policy = np.stack([policy.canary_logprobs(sequence)[-len(sample) :] for policy in policies])
    return np.abs(sample.sampled - by_policy[versions_of(sample) % 2, np.arange(len(sample))])


def check_versions(groups: Sequence[Group], last: int, policies: Sequence[PolicyLearner]) -> None:
    mixed = 0
    for group, sample in samples_of(groups):
        assert sample.policy_versions[1] <= last
        versions = versions_of(sample)
        assert (versions[0], versions[-1]) == sample.policy_versions
        assert (np.diff(versions) >= 0).all()
        mixed += sample.versions is not None
        assert distance(group, sample, policies).max() < 1e-4
    assert mixed > SAMPLES, "hardly any sample lived through new weights"


def test_every_token_has_the_logprob_of_its_version(pool: RolloutPool, policies: list[PolicyLearner]) -> None:
    run(publish(pool, policies[0], 0))
    check_versions(*run(sampled_while(pool, policies)), policies)


class AsyncWorker(OpenWorker):
    """Use through Ray. Its engine schedules a step while the last one runs, as on GPUs."""

    def _load(self) -> None:
        from vllm.platforms.cpu import CpuPlatform

        on_cpu = CpuPlatform.check_and_update_config

        def as_on_gpus(config: Any) -> None:
            on_cpu(config)
            config.scheduler_config.async_scheduling = True

        CpuPlatform.check_and_update_config = staticmethod(as_on_gpus)  # type: ignore[assignment, method-assign]
        super()._load()
        settle, queue = self.sampler.settle, self.sampler.engine.engine_core.engine_core.batch_queue
        self.settled: list[int] = []

        def settling() -> None:
            self.settled.append(len(queue))
            settle()
            assert not queue

        self.sampler.settle = settling  # type: ignore[method-assign]

    async def begun(self) -> list[int]:
        """Steps that the engine had begun and not returned, at each time that weights came."""
        return self.settled


@pytest.mark.slow
def test_what_an_asynchronous_engine_has_begun_is_of_the_weights_before(
    ray_session: None,  # noqa: F811
    model: Path,
    policies: list[PolicyLearner],
    tmp_path: Path,
) -> None:
    with opened(model, tmp_path, AsyncWorker) as pool:
        run(publish(pool, policies[0], 0))
        undisturbed = run(sampled(pool))
        disturbed, last = run(sampled_while(pool, policies[:1]))
        for (_, before), (_, after) in zip(samples_of(undisturbed), samples_of(disturbed), strict=True):
            assert before.token_ids.tolist() == after.token_ids.tolist()
            assert before.sampled.tobytes() == after.sampled.tobytes()
        assert last > 1
        run(publish(pool, policies[0], 0))
        check_versions(*run(sampled_while(pool, policies)), policies)
        assert max(run(pool.workers[0].begun.remote())) > 0, "nothing had begun: this shows less than it could"


@pytest.mark.slow
def test_kept_caches_are_for_running_requests_alone(
    ray_session: None,  # noqa: F811
    model: Path,
    policies: list[PolicyLearner],
    tmp_path: Path,
) -> None:
    def asked(name: str) -> Request:
        return Request(name, requests(length=40)[0].prompt.token_ids, 1, 60, 1.0)

    async def cached(worker: Any, *names: str) -> list[int]:
        responses = [(await worker.sample.remote([asked(name)]))[0] for name in names]
        return [response.cached_prompt_tokens for response in responses]

    async def new_weights() -> tuple[list[int], list[int]]:
        await publish(pool, policies[0], 0)
        before = await cached(pool.workers[0], "a", "b")
        await publish(pool, policies[1], 1)
        return before, await cached(pool.workers[0], "c", "d")

    with opened(model, tmp_path, cache_after_update="keep") as pool:
        assert run(new_weights()) == ([0, 32], [0, 32]), "a request took what older weights computed"
        run(publish(pool, policies[0], 0))
        undisturbed = run(sampled(pool))
        disturbed, _ = run(sampled_while(pool, policies[:1]))
        assert any(sample.versions is not None for _, sample in samples_of(disturbed))
        for (_, before), (_, after) in zip(samples_of(undisturbed), samples_of(disturbed), strict=True):
            assert before.token_ids.tolist() == after.token_ids.tolist()
            assert before.sampled.tobytes() == after.sampled.tobytes()
        run(publish(pool, policies[0], 0))
        # Half of them wait for a place while others' prompts fill blocks of 32 tokens.
        mixed, _ = run(sampled_while(pool, policies, count=8, length=40))
        first = [(distance(g, s, policies), versions_of(s) == s.policy_versions[0]) for g, s in samples_of(mixed)]
        assert max(far[own].max() for far, own in first) < 1e-4, "before new weights come all is as ever"
        assert max(far[~own].max() for far, own in first if not own.all()) > 0.01, "after them keys are of older ones"
        for group, sample in samples_of(run(sampled(pool))):
            assert distance(group, sample, policies).max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("when", ["frozen", "unproved"])
def test_an_engine_that_dies_while_weights_come_loses_nothing(
    pool: RolloutPool, policies: list[PolicyLearner], when: str
) -> None:
    index = int(when == "unproved")  # one that was not replaced yet, in another event loop

    async def steps() -> list[Group]:
        sampling = asyncio.create_task(sampled(pool))
        worker = pool.workers[index]
        pid = await worker.pid.remote()
        while not await worker.unfinished.remote():
            await asyncio.sleep(0.01)
        await worker.prepare.remote()
        assert await worker.unfinished.remote() == 2, "nothing was being sampled when the weights came"
        if when == "unproved":  # and wrong, which only the pool can see: none of their tokens may be handed over
            await worker.take.remote(WeightBundle.pack(1, policies[1].named_weights()))
            await worker.confirm.remote(CANARY)
            while await worker.unfinished.remote():
                await asyncio.sleep(0.01)
        assert not sampling.done()
        os.kill(pid, signal.SIGKILL)
        await publish(pool, policies[0], 1)
        assert pool.health[index].restarts == 1
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
