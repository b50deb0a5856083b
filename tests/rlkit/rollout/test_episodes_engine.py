"""Episodes on real vLLM in a real rollout worker: what the engine saw is what is trained on, for every template that
appends; and a learner finds the same log-probs."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learner_fixture import build_learner, grpo_advantages, smooth_steps, weights_of
from ray_fixture import ray_session, run  # noqa: F401
from rollout_host import publish_bundle
from talkative import EpisodeWorker, Seen, write_model
from test_rendering import APPEND, TOOLS_APPEND

from rewards.base import RewardContext
from rewards.environment import EnvironmentReward
from rlkit.config.schema import ClusterConfig, RolloutConfig, RunConfig, TrainerConfig
from rlkit.experience import Group, Message, Prompt
from rlkit.rollout.pool import RolloutPool
from rlkit.rollout.requests import GroupRequest
from rlkit.weights.bundle import WeightBundle
from rlkit.weights.publication import Published

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.usefixtures("ray_session")]
SAMPLES = 4
CASES = [*((name, False) for name in sorted(APPEND)), *((name, True) for name in sorted(TOOLS_APPEND))]

DROPPED = {("GLM-4", False), ("Gemma 2", False), ("Llama 3", False)}
"""In these the policy says a stop token with which the template ends no turn."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@contextmanager
def opened(
    model: Path, logs: Path, max_staleness: int = 0, worker: type[EpisodeWorker] = EpisodeWorker
) -> Iterator[RolloutPool]:
    import ray

    config = RunConfig(
        run_dir=Path("unused"),
        trainer=TrainerConfig(max_staleness=max_staleness),
        cluster=ClusterConfig(threads_per_actor=1),
        rollout=RolloutConfig(max_prompt_tokens=300, max_response_tokens=240, memory_gib=0.1),
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
    with opened(model, tmp_path_factory.mktemp("logs")) as pool:
        yield pool


async def generate(pool: RolloutPool, *names: str) -> list[Group]:
    prompt = Prompt("p", (Message("user", "Hi"),), (1,))
    requests = [GroupRequest(name, prompt, SAMPLES, seed=3, step=1) for name in names]
    return sorted([g async for ref in pool.generate(requests) for g in await ref], key=lambda group: group.id)


@pytest.fixture(scope="module")
def played(pool: RolloutPool) -> dict[Any, Any]:
    """By template, and whether tools answer: two groups, and what the engine saw meanwhile."""

    async def play() -> dict[Any, Any]:
        (worker,), groups = pool.workers, {}
        for case in CASES:
            await worker.play.remote(*case)
            groups[case] = await generate(pool, "0", "1"), await worker.engine_saw.remote()
        return groups

    return run(play())


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}{', tools' * case[1]}")
def test_what_the_engine_saw_is_what_is_trained_on(played: dict[Any, Any], case: tuple[str, bool]) -> None:
    groups, engine_saw = played[case]
    turns: Counter[tuple[str, int]] = Counter()
    for group in groups:
        for sample in group.samples:
            whole = [*group.prompt.token_ids, *sample.token_ids.tolist()]
            begin = len(group.prompt.token_ids)
            own = [span for span in sample.spans if span.role == "assistant"]
            assert sample.episode is not None and not sample.episode.failure
            for turn, span in enumerate(own):
                seen: Seen = engine_saw.pop(f"{group.id}:{sample.index}:0:{turn}")
                assert seen.prompt == whole[: begin + span.start]
                length = span.end - span.start
                dropped = len(seen.response.token_ids) - length
                sampled = seen.response.token_ids.tolist()
                assert whole[begin + span.start : begin + span.end] == sampled[:length]
                np.testing.assert_array_equal(sample.logprobs[span.start : span.end], seen.response.logprobs[:length])
                assert dropped in (0, 1) and sample.trained[span.start : span.end].all()
                turns[seen.response.finish_reason, dropped] += 1
            assert sample.spans[-1] is own[-1] and dropped == 0 and own[-1].end == len(sample)
            assert sample.length == sum(span.end - span.start for span in own)
    assert not engine_saw, "sampled and not trained on"
    assert turns["length", 0] and turns.total() > 2 * SAMPLES
    if case in DROPPED:
        assert turns["stop", 1], "no stop token was replaced: this shows less than it could"


@pytest.fixture(scope="module")
def groups(played: dict[Any, Any]) -> list[Group]:
    """Scored, of several templates."""
    some = [group for case in CASES[::6] for group in played[case][0]]
    named = [replace(group, id=f"{n}") for n, group in enumerate(some)]
    scores = EnvironmentReward(EnvironmentReward.Config(), RewardContext()).score(named)
    return [group.with_scores(own) for group, own in zip(named, scores, strict=True)]


def test_a_learner_finds_the_same_logprobs(model: Path, groups: list[Group]) -> None:
    samples = [sample for group in groups for sample in group.samples]
    assert sum(not sample.trained.all() for sample in samples) > len(samples) / 2
    for sample, logprobs in zip(samples, build_learner(model).group_logprobs(groups), strict=True):
        np.testing.assert_allclose(logprobs[sample.trained], sample.logprobs[sample.trained], atol=1e-3)


Outcome = tuple[dict[str, float], dict[str, torch.Tensor]]


def updated(model: Path, groups: Sequence[Group], **options: Any) -> Outcome:
    learner = smooth_steps(build_learner(model, learning_rate=0.1, **options))
    metrics = learner.update(list(groups), grpo_advantages(list(groups)))
    return metrics, weights_of(learner)


def with_noise(groups: Sequence[Group]) -> list[Group]:
    """In place of the log-probs of what the environment said."""
    rng, noisy = np.random.default_rng(0), []
    for group in groups:
        samples = [
            replace(s, logprobs=np.where(s.trained, s.logprobs, rng.uniform(-50, 0, len(s))).astype(np.float32))
            for s in group.samples
        ]
        noisy.append(replace(group, samples=tuple(samples)))
    return noisy


def test_what_the_environment_said_moves_no_weight(model: Path, groups: list[Group]) -> None:
    metrics, weights = updated(model, groups)
    noisy_metrics, noisy_weights = updated(model, with_noise(groups))
    assert metrics["policy/grad_norm"] > 0.01 and noisy_metrics == metrics
    assert all(torch.equal(noisy_weights[name], weight) for name, weight in weights.items())
    start = weights_of(build_learner(model))
    for options, order in (({"tokens_per_microbatch": 400}, groups), ({"tokens_per_microbatch": 1}, groups[::-1])):
        _, others = updated(model, order, **options)
        for name, weight in weights.items():
            moved = float((weight - start[name]).abs().max())
            torch.testing.assert_close(others[name], weight, atol=max(moved, 1e-6) * 2e-3, rtol=0)


def test_new_weights_wait_for_open_episodes(pool: RolloutPool, played: dict[Any, Any], model: Path) -> None:
    learner, canary = build_learner(model), ((5, 6, 7, 8), (30, 40, 50))

    async def work() -> tuple[list[Group], list[Group]]:
        (worker,) = pool.workers
        await worker.play.remote("embedded", False, 0.5)
        early = asyncio.create_task(generate(pool, "early"))
        while await worker.holds.remote() != (1, False):
            await asyncio.sleep(0.01)
        bundle = WeightBundle.pack(1, learner.named_weights())
        published = Published(bundle, 1, canary, learner.canary_logprobs(canary))
        publishing = asyncio.create_task(publish_bundle(pool, published))
        while await worker.holds.remote() != (1, True):
            await asyncio.sleep(0.01)
        late = asyncio.create_task(generate(pool, "late"))
        await publishing
        return await early, await late

    for version, (group,) in enumerate(run(work())):
        for sample in group.samples:
            assert sample.policy_versions == (version, version) and sample.versions is not None
            assert set(sample.versions.tolist()) <= {version, -1}
            assert sample.episode is not None and sample.episode.ended != "failed"


def versions_of_turns(groups: Sequence[Group]) -> list[list[set[int]]]:
    """Of each sample's turns."""
    of_samples = []
    for sample in (sample for group in groups for sample in group.samples):
        assert sample.episode is not None and sample.episode.ended != "failed"
        versions = sample.versions
        turns = [span for span in sample.spans if span.role == "assistant"]
        of_samples.append([set(versions[turn.start : turn.end].tolist()) for turn in turns])
    return of_samples


def test_parked_episodes_have_one_version_in_each_turn(ray_session: None, model: Path, tmp_path: Path) -> None:  # noqa: F811
    learner, canary = build_learner(model), ((5, 6, 7, 8), (30, 40, 50))

    async def with_new_weights(pool: RolloutPool, how: str) -> list[list[set[int]]]:
        await pool.workers[0].play.remote("embedded", False, 0.05, max_turn_tokens=40, new_weights=how)
        sampling = asyncio.create_task(generate(pool, *map(str, range(4))))
        logprobs, version = learner.canary_logprobs(canary), 0
        while not sampling.done():
            version += 1
            pool.announce(Published(WeightBundle.pack(version, learner.named_weights()), version, canary, logprobs))
            await pool.confirm({})
        return versions_of_turns(await sampling)

    with opened(model, tmp_path, max_staleness=2) as pool:
        parked = run(with_new_weights(pool, "park"))
        assert all(len(versions) == 1 for turns in parked for versions in turns)
        assert any(turns[0] != turns[-1] for turns in parked), "no weights came between the turns of an episode"
        going_on = run(with_new_weights(pool, "go_on"))
        assert any(len(versions) > 1 for turns in going_on for versions in turns)


class ParkingWorker(EpisodeWorker):
    """Use through Ray. Plays from its start, as its successor does."""

    async def start(self) -> None:
        await super().start()
        await self.play("embedded", False, 0.05, max_turn_tokens=40, new_weights="park")

    async def is_parked(self) -> tuple[int, bool]:
        """Open groups, and whether their next turns wait for weights."""
        return len(self.open), self.parked


def test_an_engine_that_dies_while_it_is_parked_loses_nothing(ray_session: None, model: Path, tmp_path: Path) -> None:  # noqa: F811
    learner, canary = build_learner(model), ((5, 6, 7, 8), (30, 40, 50))
    names = list(map(str, range(4)))

    async def publish(pool: RolloutPool, version: int) -> None:
        bundle = WeightBundle.pack(version, learner.named_weights())
        pool.announce(Published(bundle, version, canary, learner.canary_logprobs(canary)))
        await pool.confirm({})

    async def steps(pool: RolloutPool) -> tuple[list[Group], list[Group]]:
        await publish(pool, 0)
        undisturbed = await generate(pool, *names)
        sampling = asyncio.create_task(generate(pool, *names))
        (worker,) = pool.workers
        pid = await worker.pid.remote()
        while not (await worker.is_parked.remote())[0]:
            await asyncio.sleep(0.01)
        await worker.prepare.remote()
        await worker.take.remote(WeightBundle.pack(1, learner.named_weights()))
        await worker.confirm.remote(canary)
        assert await worker.is_parked.remote() == (4, True), "a turn began before the pool accepted the weights"
        os.kill(pid, signal.SIGKILL)
        await publish(pool, 1)
        return undisturbed, await sampling

    with opened(model, tmp_path, max_staleness=2, worker=ParkingWorker) as pool:
        undisturbed, disturbed = run(steps(pool))
    assert [group.id for group in disturbed] == names
    for before, after in zip(undisturbed, disturbed, strict=True):
        assert [s.token_ids.tolist() for s in before.samples] == [s.token_ids.tolist() for s in after.samples]
        assert {s.policy_versions for s in after.samples} == {(1, 1)}, "their successor had the new weights"


def test_the_engine_drops_a_turn_for_which_nobody_waits_any_more(pool: RolloutPool) -> None:
    assert run(pool.workers[0].leave_a_turn.remote()) == (True, False)


def test_no_single_response_stands_in_for_an_episode(pool: RolloutPool) -> None:
    run(pool.workers[0].lose_the_environment.remote())
    with pytest.raises(Exception, match="the environment has not started"):
        run(generate(pool, "alone"))
