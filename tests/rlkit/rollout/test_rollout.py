"""Rollout on real vLLM in a real Ray actor: tokens, log-probs, seeds, prefix cache, and weights that must be new."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from learner_fixture import VOCABULARY, build_learner, grpo_advantages, make_groups, write_tiny_model, write_tokenizer
from ray_fixture import ray_session, run  # noqa: F401
from rollout_host import OpenWorker, publish_bundle

from rlkit.config.schema import ClusterConfig, RolloutConfig, RunConfig
from rlkit.experience import Group, Message, Prompt, Sample
from rlkit.learner.policy import PolicyLearner
from rlkit.rollout.pool import RolloutFailedError, RolloutPool
from rlkit.rollout.requests import GroupRequest, Request, Response, sample_seed
from rlkit.weights.bundle import WeightBundle
from rlkit.weights.publication import Agreement, Published, WeightsNotLoadedError

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]
EOS = 1
MAX_RESPONSE = 24
BLOCK = 32
CANARY = ((5, 6, 7, 8, 9, 10), (30, 40, 50), (11, 9, 7, 5, 3))


def configured(**rollout: Any) -> RunConfig:
    sizes = {"max_prompt_tokens": 100, "max_response_tokens": MAX_RESPONSE, "max_concurrent_samples": 16}
    return RunConfig(
        run_dir=Path("unused"),
        cluster=ClusterConfig(threads_per_actor=1),
        rollout=RolloutConfig(**sizes, memory_gib=0.1, **rollout),
        algorithm={},
        reward={},
        data={},
        verifier={},
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights large enough that next-token distributions are far from uniform."""
    return write_tokenizer(write_tiny_model(tmp_path_factory.mktemp("policy"), initializer_range=0.3))


@pytest.fixture(scope="module")
def learner(model: Path) -> PolicyLearner:
    """The same policy as the pool's first."""
    return build_learner(model)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> PolicyLearner:
    """Another policy of the same shape."""
    return build_learner(write_tiny_model(tmp_path_factory.mktemp("other"), seed=1, initializer_range=0.3))


@pytest.fixture(scope="module")
def pool(ray_session: None, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RolloutPool]:  # noqa: F811
    """One worker; every test leaves it with the weights of `learner`."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlkit.rollout.worker.RolloutWorker", OpenWorker)  # also those that replace dead ones
        pool = RolloutPool(configured(), str(model), tmp_path_factory.mktemp("logs"))
        run(pool.start())
        yield pool
    for worker in pool.workers:
        ray.kill(worker)


def prompt(length: int, seed: int = 0) -> Prompt:
    tokens = np.random.default_rng(seed).integers(3, VOCABULARY, length)
    return Prompt(f"p{length}-{seed}", (Message("user", "?"),), tuple(tokens.tolist()))


def request(name: str, asked: Prompt, samples: int = 4, seed: int = 7) -> GroupRequest:
    return GroupRequest(id=name, prompt=asked, samples=samples, seed=seed, step=3)


async def groups_of(stream: AsyncIterator[Any]) -> dict[str, Group]:
    return {group.id: group async for ref in stream for group in await ref}


def generate(pool: RolloutPool, requests: Sequence[GroupRequest]) -> dict[str, Group]:
    return run(groups_of(pool.generate(requests)))


def sample(pool: RolloutPool, requests: Sequence[Request]) -> list[Response]:
    async def ask() -> list[Response]:
        return await pool.workers[0].sample.remote(list(requests))

    return run(ask())


def publish(pool: RolloutPool, learner: PolicyLearner, version: int) -> Agreement:
    bundle = WeightBundle.pack(version, learner.named_weights())
    return run(publish_bundle(pool, Published(bundle, version, CANARY, learner.canary_logprobs(CANARY))))


def tokens_of(group: Group) -> list[list[int]]:
    return [sample.token_ids.tolist() for sample in group.samples]


def difference(learner: PolicyLearner, groups: Sequence[Group]) -> float:
    """Largest difference between the sampler's log-probs and the learner's."""
    sampled = [sample.logprobs for group in groups for sample in group.samples]
    return max(float(np.abs(a - b).max()) for a, b in zip(sampled, learner.group_logprobs(groups), strict=True))


def test_groups_come_back_whole_with_the_tokens_that_were_sampled(pool: RolloutPool, model: Path) -> None:
    from transformers import AutoTokenizer

    requests = [request(f"g{i}", prompt(4 + i, i), samples=3 + i % 2) for i in range(6)]
    groups = generate(pool, requests)
    assert groups.keys() == {each.id for each in requests}
    tokenizer = AutoTokenizer.from_pretrained(model)
    reasons = set()
    for asked in requests:
        group = groups[asked.id]
        assert group.prompt == asked.prompt
        assert group.step == 3
        assert [each.index for each in group.samples] == list(range(asked.samples))
        for each in group.samples:
            tokens = each.token_ids.tolist()
            assert each.token_ids.dtype == np.int32
            assert each.logprobs.dtype == np.float32
            assert all(0 <= token < VOCABULARY for token in tokens)
            assert EOS not in tokens[:-1], "sampled on after the stop token"
            assert each.finish_reason == ("stop" if tokens[-1] == EOS else "length")
            assert 1 <= len(tokens) <= MAX_RESPONSE
            assert each.finish_reason == "stop" or len(tokens) == MAX_RESPONSE
            assert (each.logprobs <= 0).all()
            assert each.text == tokenizer.decode(tokens, skip_special_tokens=True)
            assert "<eos>" not in each.text
            assert each.policy_versions == (0, 0)
            assert each.seed == sample_seed(7, asked.id, each.index)
            reasons.add(each.finish_reason)
    assert reasons == {"stop", "length"}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_the_learners(pool: RolloutPool, model: Path, temperature: float) -> None:
    asked = [prompt(length, length) for length in (1, 5, 40, 90)]
    requests = [
        Request(f"{i}:{j}", each.token_ids, seed=10 * i + j, max_tokens=MAX_RESPONSE, temperature=temperature)
        for i, each in enumerate(asked)
        for j in range(3)
    ]
    responses = sample(pool, requests)
    groups = [
        Group(
            f"g{i}",
            each,
            tuple(
                Sample(j, r.token_ids, r.logprobs, "", r.finish_reason, (0, 0), 0)
                for j, r in enumerate(responses[3 * i : 3 * i + 3])
            ),
        )
        for i, each in enumerate(asked)
    ]
    assert difference(build_learner(model, temperature=temperature), groups) < 1e-4
    assert difference(build_learner(model, temperature=temperature + 0.2), groups) > 1e-2


def test_a_seed_gives_the_same_tokens_whatever_else_is_sampled(pool: RolloutPool) -> None:
    alone = generate(pool, [request("a", prompt(6))])["a"]
    crowd = [request(f"x{i}", prompt(3 + i, i), seed=i) for i in range(9)]
    crowded = generate(pool, [*crowd[:4], request("a", prompt(6)), *crowd[4:]])["a"]
    assert tokens_of(crowded) == tokens_of(alone)
    for one, two in zip(alone.samples, crowded.samples, strict=True):
        np.testing.assert_allclose(one.logprobs, two.logprobs, atol=1e-5)
    assert len({tuple(tokens) for tokens in tokens_of(alone)}) == 4, "samples of one group must differ"
    assert tokens_of(generate(pool, [request("a", prompt(6), seed=8)])["a"]) != tokens_of(alone)
    assert tokens_of(generate(pool, [request("b", prompt(6))])["b"]) != tokens_of(alone)


def test_a_greedy_response_comes_beside_the_samples(pool: RolloutPool) -> None:
    asked = prompt(20)
    with_greedy = [replace(request(f"g{seed}", asked, samples=2, seed=seed), greedy=True) for seed in (1, 2)]
    one, two = generate(pool, with_greedy).values()
    assert one.greedy is not None and two.greedy is not None
    assert one.greedy.token_ids.tolist() == two.greedy.token_ids.tolist()  # whatever the seed
    assert len(one.samples) == 2 and tokens_of(one) != tokens_of(two)
    plain = generate(pool, [request("g1", asked, samples=2, seed=1)])["g1"]
    assert plain.greedy is None
    assert tokens_of(plain) == tokens_of(one)  # the samples do not depend on it


def test_an_evaluation_may_be_greedy_and_shorter(pool: RolloutPool, model: Path) -> None:
    """Each token of the greedy response is the likeliest by transformers."""
    from transformers import AutoModelForCausalLM

    asked = [replace(request(f"g{i}", prompt(12, i), samples=1), temperature=0.0) for i in range(4)]
    groups = generate(pool, asked)
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for group in groups.values():
        answer = group.samples[0].token_ids.tolist()
        tokens = [*group.prompt.token_ids, *answer]
        with torch.no_grad():
            likeliest = policy(torch.tensor([tokens])).logits[0].argmax(-1).tolist()
        assert answer == likeliest[len(group.prompt.token_ids) - 1 : -1]
    short = generate(pool, [replace(each, max_response_tokens=3) for each in asked])
    for name, group in short.items():
        assert group.samples[0].token_ids.tolist() == groups[name].samples[0].token_ids[:3].tolist()


def test_a_groups_prompt_is_prefilled_once(pool: RolloutPool) -> None:
    long = prompt(2 * BLOCK + 6, seed=99)
    requests = [Request(f"{i}", long.token_ids, seed=i, max_tokens=4, temperature=1.0) for i in range(5)]
    cached = [response.cached_prompt_tokens for response in sample(pool, requests)]
    assert sorted(cached) == [0, *[2 * BLOCK] * 4]


def test_new_weights_are_sampled_from_at_once(pool: RolloutPool, learner: PolicyLearner, other: PolicyLearner) -> None:
    """With an old prefix cache, or an old copy of any weight, log-probs after the update would not be the learner's."""
    asked = [request("w", prompt(2 * BLOCK + 3, 5)), request("v", prompt(7, 5))]
    before = generate(pool, asked)
    assert difference(learner, list(before.values())) < 1e-4
    try:
        assert publish(pool, other, 1).difference < 1e-4
        after = generate(pool, asked)
        assert difference(other, list(after.values())) < 1e-4
        assert difference(learner, list(after.values())) > 0.1
        assert {each.policy_versions for group in after.values() for each in group.samples} == {(1, 1)}
    finally:
        publish(pool, learner, 2)
    again = generate(pool, asked)
    assert [tokens_of(again[name]) for name in "wv"] == [tokens_of(before[name]) for name in "wv"]
    assert difference(learner, list(again.values())) < 1e-4


def test_no_group_mixes_versions(pool: RolloutPool, learner: PolicyLearner, other: PolicyLearner) -> None:
    bundle = WeightBundle.pack(11, other.named_weights())
    wanted = other.canary_logprobs(CANARY)

    async def overlap() -> tuple[dict[str, Group], dict[str, Group], dict[str, Group]]:
        running = asyncio.ensure_future(groups_of(pool.generate([request(f"r{i}", prompt(9, i)) for i in range(12)])))
        await asyncio.sleep(0.05)
        loading = asyncio.ensure_future(publish_bundle(pool, Published(bundle, 11, CANARY, wanted)))
        later = asyncio.ensure_future(groups_of(pool.generate([request(f"l{i}", prompt(9, i)) for i in range(3)])))
        await loading
        afterwards = asyncio.ensure_future(groups_of(pool.generate([request("a", prompt(9))])))
        return await running, await later, await afterwards

    try:
        running, later, afterwards = run(overlap())
    finally:
        publish(pool, learner, 12)
    for group in [*running.values(), *later.values(), *afterwards.values()]:
        (versions,) = {each.policy_versions for each in group.samples}
        assert versions[0] == versions[1]
        assert difference(other if versions[0] == 11 else learner, [group]) < 1e-4
    assert {sample.policy_versions for group in afterwards.values() for sample in group.samples} == {(11, 11)}


def test_damaged_weights_are_not_sampled_from(pool: RolloutPool, learner: PolicyLearner, other: PolicyLearner) -> None:
    """The pool's only worker gets them, so the run ends."""
    bundle = WeightBundle.pack(21, other.named_weights())
    *entries, last = bundle.entries
    data = last.data.copy()
    data[len(data) // 2] ^= 1
    damaged = Published(
        replace(bundle, entries=(*entries, replace(last, data=data))), 21, CANARY, other.canary_logprobs(CANARY)
    )
    with pytest.raises(WeightsNotLoadedError, match="worker 0: weights of version 21 arrived damaged"):
        run(publish_bundle(pool, damaged))
    publish(pool, learner, 22)
    assert difference(learner, list(generate(pool, [request("d", prompt(8))]).values())) < 1e-4


def test_weights_that_no_worker_confirms_end_the_run(
    pool: RolloutPool, learner: PolicyLearner, other: PolicyLearner
) -> None:
    bundle = WeightBundle.pack(31, learner.named_weights())
    with pytest.raises(WeightsNotLoadedError, match=r"worker 0: after version 31 .* differ from .*canary_tolerance"):
        run(publish_bundle(pool, Published(bundle, 31, CANARY, other.canary_logprobs(CANARY))))
    nothing = np.full(sum(len(ids) - 1 for ids in CANARY), np.nan)
    with pytest.raises(WeightsNotLoadedError, match="canary"):
        run(publish_bundle(pool, Published(bundle, 31, CANARY, nothing)))
    with pytest.raises(WeightsNotLoadedError, match="version 31, not 32"):
        run(publish_bundle(pool, Published(bundle, 32, CANARY, learner.canary_logprobs(CANARY))))
    assert pool.health[0].restarts == 0
    publish(pool, learner, 33)


def test_every_tensor_reaches_the_engine(pool: RolloutPool, model: Path, learner: PolicyLearner) -> None:
    """Weights are changed one tensor after the other, so that none can hide behind the others' changes."""
    changing, generator, version = build_learner(model), torch.Generator().manual_seed(0), 40
    try:
        for name, parameter in changing.named_weights():
            with torch.no_grad():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
            version += 1
            publish(pool, changing, version)
            (group,) = generate(pool, [request("s", prompt(50, 3))]).values()
            assert difference(changing, [group]) < 1e-4, name
    finally:
        publish(pool, learner, version + 1)


def test_a_tensor_that_is_missing_is_an_error_that_names_it(pool: RolloutPool, learner: PolicyLearner) -> None:
    """vLLM itself logs a line and keeps the old layer; what it logs in every healthy run is no error."""
    weights = dict(learner.named_weights())
    for missing, named in [
        ("model.layers.1.mlp.down_proj.weight", r"model\.layers\.1\.mlp\.down_proj 0 of 6144"),
        ("model.layers.0.self_attn.q_proj.weight", r"model\.layers\.0\.self_attn\.qkv_proj 8192 of 12288"),
        ("model.norm.weight", r"model\.norm 0 of 64"),
        ("model.embed_tokens.weight", r"model\.embed_tokens 0 of 3840"),
    ]:
        bundle = WeightBundle.pack(60, [(name, tensor) for name, tensor in weights.items() if name != missing])
        with pytest.raises(WeightsNotLoadedError, match=named):
            run(publish_bundle(pool, Published(bundle, 60, CANARY, learner.canary_logprobs(CANARY))))
        publish(pool, learner, 61)
    log = (pool.logs / "rollout-0.log").read_text()
    assert "Failed to load weights" not in log and "weights were not loaded" not in log


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_engine_with_old_weights_is_found_after_one_small_step(
    dtype: Literal["float32", "bfloat16"],
    model: Path,
    tmp_path: Path,
    ray_session: None,  # noqa: F811
) -> None:
    """Learning rate 1e-6, which moves log-probs a hundred times less than bfloat16's rounding does. The engine counts
    what comes, reports version and checksum, and loads what it had."""
    import ray

    trained = build_learner(model, learning_rate=1e-6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlkit.rollout.worker.RolloutWorker", OpenWorker)
        pool = RolloutPool(configured(dtype=dtype), str(model), tmp_path)
    try:
        run(pool.start())
        for version in range(3):
            publish(pool, trained, version)
            groups = make_groups(seed=version)
            trained.update(groups, grpo_advantages(groups))
        run(pool.workers[0].keep_old_weights.remote())
        publish(pool, trained, 3)  # it keeps this one
        groups = make_groups(seed=3)
        trained.update(groups, grpo_advantages(groups))
        said = "it kept the old weights" if dtype == "bfloat16" else "kept the old|older weights"
        with pytest.raises(WeightsNotLoadedError, match=said):
            publish(pool, trained, 4)
    finally:
        for worker in pool.workers:
            ray.kill(worker)


async def kill_in_mid_stream(pool: RolloutPool, requests: Sequence[GroupRequest]) -> list[Group]:
    """kill -9 of the worker's process when the first groups have come; every group as often as it came."""
    groups: list[Group] = []
    stream = pool.generate(requests)
    async for ref in stream:
        if not groups:
            os.kill(await pool.workers[0].pid.remote(), signal.SIGKILL)
        groups += await ref
    return groups


@pytest.mark.slow
def test_a_dead_worker_is_replaced_and_nothing_is_lost_or_sampled_twice(
    pool: RolloutPool, other: PolicyLearner
) -> None:
    """Near the end of this file: it kills the worker."""
    publish(pool, other, 41)
    requests = [request(f"k{i}", prompt(9, i), samples=8) for i in range(40)]
    undisturbed = generate(pool, requests)
    groups = run(kill_in_mid_stream(pool, requests))
    assert sorted(group.id for group in groups) == sorted(undisturbed)
    for group in groups:
        assert tokens_of(group) == tokens_of(undisturbed[group.id])
        # The new process was given the weights before it took work.
        assert {sample.policy_versions[0] for sample in group.samples} == {41}
    assert pool.health[0].restarts == 1
    assert pool.health[0].may_sample(41)


def test_a_worker_that_dies_too_often_ends_the_run(pool: RolloutPool) -> None:
    """Last: it leaves no worker."""
    pool.health[0] = replace(pool.health[0], restarts=1, max_restarts=1)
    with pytest.raises(RolloutFailedError, match=r"after 1 replacements \(rollout\.max_restarts\)"):
        run(kill_in_mid_stream(pool, [request(f"z{i}", prompt(9, i), samples=8) for i in range(40)]))
