"""Rollout workers that die or fail at the worst moments: nothing is sampled with weights that nobody has checked.

Real Ray actors.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ray_fixture import ray_session, run  # noqa: F401
from scripted_rollout import (
    CANARY,
    Script,
    ScriptedWorker,
    Stepwise,
    assert_whole_and_of,
    kill,
    publish,
    published,
    sampled,
    started,
    until_at,
)

from rlkit.cluster.waiting import WaitedTooLongError, open_waits
from rlkit.config.schema import ClusterConfig, RolloutConfig, RunConfig, TrainerConfig
from rlkit.rollout.pool import RolloutFailedError, RolloutPool
from rlkit.weights.publication import Published, WeightsNotLoadedError

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.usefixtures("ray_session")]
MakePool = Callable[..., RolloutPool]


@pytest.fixture
def script(tmp_path: Path) -> Script:
    return Script(tmp_path)


@pytest.fixture
def make_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakePool]:
    """Makes a pool of workers that follow the script in `tmp_path`."""
    import ray

    monkeypatch.setattr("rlkit.rollout.worker.RolloutWorker", ScriptedWorker)
    made: list[RolloutPool] = []

    def make(workers: int = 1, max_restarts: int = 3, source: Any = "policy", **trainer: Any) -> RolloutPool:
        config = RunConfig(
            run_dir=tmp_path,
            cluster=ClusterConfig(threads_per_actor=1),
            rollout=RolloutConfig(workers=workers, max_restarts=max_restarts, memory_gib=0.1, source=source),
            trainer=TrainerConfig(**trainer),
            algorithm={},
            reward={},
            data={},
            verifier={},
        )
        made.append(RolloutPool(config, "no model", tmp_path / "logs"))
        return made[-1]

    yield make
    for pool in made:
        for worker in pool.workers:
            ray.kill(worker)


def test_a_place_is_free_when_a_response_ends_though_its_group_is_not_whole(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And when a new process has begun again with all of them."""

    async def check() -> None:
        pool = make_pool()
        monkeypatch.setattr("rlkit.rollout.worker.RolloutWorker", Stepwise)
        pool.workers[0] = pool._make(0)
        await started(pool)
        full = pool.config.rollout.max_concurrent_samples
        sampling = asyncio.create_task(sampled(pool, full // 2))
        await asyncio.sleep(0)
        places = asyncio.create_task(pool.places(2))
        await asyncio.sleep(0.1)
        assert not places.done()
        await pool.workers[0].allow.remote(1)
        assert await places == 1
        await kill(pool)
        while pool.health[0].restarts == 0 or not pool.health[0].may_sample(1):
            await asyncio.sleep(0.01)
        places = asyncio.create_task(pool.places(2))
        await asyncio.sleep(0.1)
        assert not places.done()
        await pool.workers[0].allow.remote(5)
        assert await places >= 1
        await pool.workers[0].allow.remote(full - 5)
        assert_whole_and_of(1, await sampling, full // 2)
        assert await pool.places(2) == full // 2

    run(check())


def test_what_is_asked_for_before_its_weights_waits_for_them_and_is_handed_over_once_they_are_accepted(
    make_pool: MakePool, script: Script
) -> None:
    """The engine begins as soon as it has them; a successor waits as the worker did that died."""

    async def check() -> None:
        pool = await started(make_pool())
        early = asyncio.create_task(sampled(pool, oldest=2))
        await asyncio.sleep(0.2)
        await kill(pool)
        while not (pool.health[0].restarts == 1 and pool.health[0].may_sample(1)):
            await asyncio.sleep(0.02)
        assert not (script.folder / "at-step").exists()
        new = published(2)
        pool.load(new.bundle, CANARY)
        await until_at(script, "step")
        pool.announce(new)
        await asyncio.sleep(0.2)
        assert not early.done()
        await pool.confirm({})
        assert_whole_and_of(2, await early)

    run(check())


def test_a_frozen_model_waits_for_no_weights(make_pool: MakePool) -> None:
    async def check() -> None:
        pool = make_pool(source="model")
        await pool.start()
        groups = await sampled(pool, oldest=7)
        assert [len(group.samples) for group in groups] == [2] * 4

    run(check())


@pytest.mark.parametrize("max_staleness", [0, 1])
@pytest.mark.parametrize("point", ["load-2", "canary"])
def test_a_worker_that_dies_while_weights_are_published_is_replaced_with_these_weights(
    point: str, max_staleness: int, make_pool: MakePool, script: Script
) -> None:
    """`canary`: after it has received them, before it confirms."""

    async def check() -> None:
        pool = await started(make_pool(workers=2, max_staleness=max_staleness))
        script.die_at(point)  # one of the two
        await publish(pool, 2)
        assert sorted(health.restarts for health in pool.health) == [0, 1]
        assert all(health.may_sample(2) for health in pool.health)
        assert_whole_and_of(2, await sampled(pool))

    run(check())


def test_a_worker_that_dies_with_weights_before_they_are_announced_is_replaced_with_those_that_are(
    make_pool: MakePool,
) -> None:
    """As in a run: workers load while the learner computes the canary. The successor loads the new ones thereafter."""

    async def check() -> None:
        pool, new = await started(make_pool(workers=2)), published(2)
        pool.load(new.bundle, CANARY)
        for _, receipt in list(pool._loading.values()):
            assert (await receipt).version == 2
        await kill(pool)
        sampling = asyncio.create_task(sampled(pool))
        while not (pool.health[0].restarts == 1 and pool.health[0].may_sample(1)):
            await asyncio.sleep(0.02)
        pool.announce(new)
        await pool.confirm({})
        for group in await sampling:
            ((version,),) = {sample.policy_versions[:1] for sample in group.samples}
            assert {value for sample in group.samples for value in sample.logprobs.tolist()} == {-float(version)}
        assert [health.may_sample(2) for health in pool.health] == [True, True]
        assert [health.restarts for health in pool.health] == [1, 0]
        assert_whole_and_of(2, await sampled(pool))

    run(check())


def test_weights_published_while_a_dead_worker_is_replaced_are_what_its_successor_samples_with(
    make_pool: MakePool, script: Script
) -> None:
    async def check() -> None:
        pool = await started(make_pool())
        script.hold_at("load-1")
        await kill(pool)
        sampling = asyncio.create_task(sampled(pool))  # notices the death
        await until_at(script, "load-1")  # its successor is just being given version 1
        publishing = asyncio.create_task(publish(pool, 2))
        await asyncio.sleep(0.5)
        assert not publishing.done() and not sampling.done()
        script.let_go("load-1")
        await publishing
        assert_whole_and_of(2, await sampling)
        assert pool.health[0].restarts == 1

    run(check())


def test_a_death_that_sampling_and_publishing_both_notice_is_repaired_once(make_pool: MakePool, script: Script) -> None:
    async def check() -> None:
        pool = await started(make_pool())
        script.hold_at("step")
        sampling = asyncio.create_task(sampled(pool))
        await until_at(script, "step")
        publishing = asyncio.create_task(publish(pool, 2))  # waits for the open groups
        await asyncio.sleep(0.3)
        await kill(pool)
        script.let_go("step")
        await publishing
        assert_whole_and_of(2, await sampling)
        assert pool.health[0].restarts == 1

    run(check())


def test_a_successor_that_is_not_ready_in_time_ends_the_run_with_the_cause(
    make_pool: MakePool, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check() -> None:
        pool = await started(make_pool(startup_timeout_seconds=15))
        pool.config = pool.config.model_copy(update={"trainer": TrainerConfig(startup_timeout_seconds=2)})
        script.hold_at("start")
        await kill(pool)
        said = r"worker 0 died .* waited more than trainer\.startup_timeout_seconds=2 s for rollout worker 0 to load"
        with pytest.raises(RolloutFailedError, match=said):
            await sampled(pool)

    run(check())


def test_a_worker_that_hangs_is_named_with_the_groups_it_owes(make_pool: MakePool, script: Script) -> None:
    async def check() -> None:
        pool = await started(make_pool(workers=2))
        pool.config = pool.config.model_copy(update={"trainer": TrainerConfig(step_timeout_seconds=1)})
        script.hold_at("step")
        with pytest.raises(WaitedTooLongError) as error:
            await sampled(pool)
        script.let_go("step")
        said = str(error.value)
        assert "the rollout pool waited more than trainer.step_timeout_seconds=1 s for rollout worker " in said
        assert "to sample 2 of 2 groups: g0 of prompt p, g2 of prompt p" in said
        assert "rollout worker 1 to sample 2 of 2 groups: g1 of prompt p, g3 of prompt p" in said
        assert open_waits() == []

    run(check())


DOUBTS = {
    "damaged": "weights of version 2 arrived damaged: their checksum is",
    "stale": "has weights of version 1, not 2",
    "wrong": r"after version 2 was loaded, its log-probs .* differ from the learner's by 0.5",
}


@pytest.mark.parametrize("max_staleness", [0, 1])
@pytest.mark.parametrize("how", DOUBTS)
def test_a_worker_that_does_not_confirm_its_weights_is_not_used_but_replaced(
    how: str, max_staleness: int, make_pool: MakePool, script: Script, caplog: pytest.LogCaptureFixture
) -> None:
    """Also by groups that wait for the new weights, or that it went on with before the pool had judged them."""

    async def check() -> None:
        pool = await started(make_pool(workers=2, max_staleness=max_staleness))
        script.spoil(2, how)  # for one of the two
        script.hold_at("canary")
        publishing = asyncio.create_task(publish(pool, 2))
        await until_at(script, "canary")
        sampling = asyncio.create_task(sampled(pool, 40))
        await asyncio.sleep(0.3)
        script.let_go("canary")
        await publishing
        assert_whole_and_of(2, await sampling, 40)
        assert sorted(health.restarts for health in pool.health) == [0, 1]
        assert all(health.may_sample(2) for health in pool.health)

    run(check())
    assert re.search(
        rf"did not confirm its weights and is being replaced.*rollout worker [01]:? {DOUBTS[how]}", caplog.text
    )


@pytest.mark.parametrize("how", list(DOUBTS))
def test_weights_that_no_worker_confirms_end_the_run_at_once(how: str, make_pool: MakePool, script: Script) -> None:
    """New engines would differ from the learner as well."""

    async def check() -> None:
        pool = await started(make_pool(workers=2))
        script.spoil(2, how, always=True)
        with pytest.raises(WeightsNotLoadedError, match=f"rollout worker 0:? {DOUBTS[how]}"):
            await publish(pool, 2)
        assert [health.restarts for health in pool.health] == [0, 0]

    run(check())


AGAIN = r"after 1 replacements \(rollout\.max_restarts\)"
SUCCESSORS: dict[str, tuple[Callable[[Script, bool], None], type[Exception], str]] = {
    "fails to start": (
        lambda script, always: script.raise_at("start"),
        RolloutFailedError,
        r"worker 0 failed again, after 1 replacements .*: ValueError: scripted failure at start\. Its log",
    ),
    "dies": (lambda script, always: script.die_at("load-1"), RolloutFailedError, AGAIN),
    "does not confirm": (
        lambda script, always: script.spoil(1, "wrong", always),
        WeightsNotLoadedError,
        rf"worker 0: after version 1 .* differ .* by 0\.5.*, {AGAIN}\. ",
    ),
}
"""What the first successor does (`always`: each one), and the error where that is once too often."""


@pytest.mark.parametrize("max_restarts", [2, 1])
@pytest.mark.parametrize("how", SUCCESSORS)
def test_a_successor_that_fails_counts_as_another_death(
    how: str, max_restarts: int, make_pool: MakePool, script: Script
) -> None:
    """It may fail to start while processes of the dead one still hold its GPU's memory."""

    async def check() -> None:
        pool = await started(make_pool(max_restarts=max_restarts))
        spoil, error, said = SUCCESSORS[how]
        spoil(script, max_restarts == 1)
        await kill(pool)
        if max_restarts == 2:
            assert_whole_and_of(1, await sampled(pool))
            assert pool.health[0].restarts == 2
            return
        with pytest.raises(error, match=said):
            await sampled(pool)

    run(check())


def test_the_deadline_of_a_start_does_not_hold_for_weights_that_wait_for_the_learner(make_pool: MakePool) -> None:
    """With stale data a new worker's weights come after the update that the learner is at."""

    async def check() -> None:
        pool = await started(make_pool())
        limits: list[set[str]] = []

        async def fetch() -> Published:
            limits.append({wait.limit for wait in open_waits()})
            return published(1)

        pool.fetch = fetch
        await pool.confirm(await pool.prepare(replace(published(1), bundle=None)))  # it has these weights
        await kill(pool)
        assert_whole_and_of(1, await sampled(pool))
        assert limits == [set()], "a deadline of the driver's, beside the learner's own"

    run(check())


def test_an_engine_that_fails_while_it_receives_ends_the_transfer_with_the_cause(make_pool: MakePool) -> None:
    """Whoever sends may be stuck: with NCCL and gloo it waits for all receivers."""

    async def check() -> None:
        pool = await started(make_pool(workers=2))
        ready = await pool.prepare(replace(published(2), bundle=None))
        arriving = asyncio.create_task(pool.arrival(ready))
        await asyncio.sleep(0.3)
        assert not arriving.done()
        with pytest.raises(ValueError, match="no room for this bucket"):
            await ready[1].transfer.remote("update_weights", {}, 2)
        said = r"rollout worker 1 failed while .* sending it weights.*: ValueError: no room for this bucket\. Its log: "
        with pytest.raises(WeightsNotLoadedError, match=said):
            await asyncio.wait_for(arriving, 5)

    run(check())


def test_engines_draw_differently_and_a_replacement_as_the_one_before(make_pool: MakePool) -> None:
    async def seeds(pool: RolloutPool) -> list[int]:
        return list(await asyncio.gather(*(worker.seed.remote() for worker in pool.workers)))

    pool = make_pool(workers=2)
    first, second = run(seeds(pool))
    assert first != second
    pool.workers[1] = pool._make(1)
    assert run(seeds(pool)) == [first, second]
