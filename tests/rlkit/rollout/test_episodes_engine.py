"""Episodes on real vLLM in a real rollout worker: what the engine saw is what is trained on, for every template that
appends; and a learner finds the same log-probs."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from learner_fixture import WholeLearner, build_learner, grpo_advantages, smooth_steps, weights_of
from ray_fixture import ray_session  # noqa: F401
from talkative import EpisodeWorker, Seen, write_model
from test_rendering import APPEND, TOOLS_APPEND

from rewards.environment import EnvironmentReward
from rlkit.config.schema import ClusterConfig, RolloutConfig, RunConfig
from rlkit.experience import Group, Message, Prompt
from rlkit.rollout.pool import RolloutPool
from rlkit.rollout.requests import GroupRequest

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]
T = TypeVar("T")
SAMPLES = 4
CASES = [*((name, False) for name in sorted(APPEND)), *((name, True) for name in sorted(TOOLS_APPEND))]


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(coroutine, 90))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def played(ray_session: None, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Any, Any]]:  # noqa: F811
    """By template, and whether tools answer: two groups, and what the engine saw meanwhile."""
    import ray

    config = RunConfig(
        run_dir=Path("unused"),
        cluster=ClusterConfig(threads_per_actor=1),
        rollout=RolloutConfig(max_prompt_tokens=300, max_response_tokens=240, memory_gib=0.1),
        algorithm={},
        reward={},
        data={},
        verifier={},
    )

    async def play(pool: RolloutPool) -> dict[Any, Any]:
        await pool.start()
        (worker,), groups = pool.workers, {}
        for case in CASES:
            await worker.play.remote(*case)
            prompt = Prompt("p", (Message("user", "Hi"),), (1,))
            requests = [GroupRequest(f"{n}", prompt, SAMPLES, seed=3, step=1) for n in range(2)]
            asked = [group async for ref in pool.generate(requests) for group in await ref]
            groups[case] = sorted(asked, key=lambda group: group.id), await worker.engine_saw.remote()
        return groups

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlkit.rollout.pool.RolloutWorker", EpisodeWorker)
        pool = RolloutPool(config, str(model), tmp_path_factory.mktemp("logs"))
        yield run(play(pool))
    for worker in pool.workers:
        ray.kill(worker)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}{', tools' * case[1]}")
def test_what_the_engine_saw_is_what_is_trained_on(played: dict[Any, Any], case: tuple[str, bool]) -> None:
    groups, engine_saw = played[case]
    turns = Counter()
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
    print(case, turns, Counter(s.episode.ended for g in groups for s in g.samples), [len(g.samples[0]) for g in groups])
