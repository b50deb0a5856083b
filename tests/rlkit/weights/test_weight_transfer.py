"""Weights on their way, without Ray: buckets, checksum, what a sender offers, which way they take, room for others."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from learner_fixture import build_learner, grpo_advantages, make_groups, weights_of, write_tiny_model

from rlkit.config.loading import load_config
from rlkit.config.messages import ConfigError
from rlkit.config.plan import engines_sleep, offloads, weight_route
from rlkit.config.report import plan
from rlkit.config.schema import RunConfig
from rlkit.learner.engine import offload, reload
from rlkit.learner.policy import PolicyLearner
from rlkit.learner.state import full_state
from rlkit.weights import bundle as module
from rlkit.weights.bundle import TensorMeta, WeightDigest, buckets, pack, unpack

LIMIT = 10_000
BATCH = ("trainer.prompts_per_step=64",)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


# -- buckets and their checksum --------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 40)), st.integers(1, 60))
def test_buckets_hold_everything_once_in_order_and_are_full(sizes: list[int], limit: int) -> None:
    metas = [TensorMeta(str(i), torch.uint8, (size,)) for i, size in enumerate(sizes)]
    found = list(buckets(metas, limit))
    assert [meta for bucket in found for meta in bucket] == metas
    for bucket in found:
        assert sum(meta.bytes for meta in bucket) <= limit or len(bucket) == 1
    for bucket, following in pairwise(found):
        assert sum(meta.bytes for meta in bucket) + following[0].bytes > limit


def assorted() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "fp32": torch.randn(3, 5, generator=generator),
        "odd": torch.randn(7, generator=generator).bfloat16(),
        "transposed": torch.randn(4, 2, generator=generator).half().T,
        "nan": torch.tensor([float("nan"), float("-inf"), -0.0]),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "flags": torch.tensor([True, False, True]),
        "empty": torch.zeros(0, 4),
    }


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def test_a_packed_bucket_carries_every_bit() -> None:
    weights = assorted()
    metas = [TensorMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in weights.items()]
    buffer = pack(list(weights.values()))
    assert buffer.numel() == sum(meta.bytes for meta in metas)
    received = dict(unpack(buffer, metas))
    buffer.zero_()  # it is filled again for the next bucket
    assert received.keys() == weights.keys()
    for name, tensor in weights.items():
        assert (received[name].dtype, received[name].shape) == (tensor.dtype, tensor.shape)
        assert bits(received[name]) == bits(tensor)


def checksum(weights: dict[str, torch.Tensor]) -> str:
    digest = WeightDigest()
    for name, tensor in weights.items():
        digest.add(name, tensor)
    return digest.hexdigest()


def noise(size: int) -> torch.Tensor:
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_the_checksum_is_of_what_arrived_and_not_of_how() -> None:
    buffer = noise(20_001)
    slices = {"one": buffer[1:16_385], "two": buffer[16_385:]}  # begin anywhere
    weights = assorted() | {name: part.clone() for name, part in slices.items()}
    wanted = checksum(weights)
    assert checksum(dict(reversed(weights.items()))) == wanted
    assert checksum(weights | slices) == wanted
    rows = weights["one"].view(torch.int32).view(-1, module._ROW)
    places = module._weights(torch.device("cpu")).tolist()
    assert len(set(places)) == module._ROW
    totals = [sum(value * weight for value, weight in zip(row, places, strict=True)) for row in rows.tolist()]
    assert [total % 2**32 for total in totals] == [s % 2**32 for s in module._condensed(slices["one"])[0].tolist()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_the_checksum_finds_a_bit_in_rows_that_are_added_up_and_in_the_rest(dtype: torch.dtype) -> None:
    data = noise(3 * 4 * module._ROW + 500)
    wanted = checksum({"a": data.view(dtype)})
    for place in (0, 4095, 4096, 9000, 3 * 4096, len(data) - 1):
        for bit in (1, 128):
            changed = data.clone()
            changed[place] ^= bit
            assert checksum({"a": changed.view(dtype)}) != wanted, (place, bit)
    for places in ([0, 4], [8, 4096 + 8], [100, 3 * 4096 + 100]):
        changed = data.clone()
        changed[places] = data[places[::-1]]
        assert checksum({"a": changed.view(dtype)}) != wanted, places


def test_the_checksum_finds_whatever_goes_wrong() -> None:
    weights = assorted()
    wanted, found = checksum(weights), set()
    for name, tensor in weights.items():
        for place in range(tensor.numel()):
            changed = tensor.clone().contiguous()
            changed.view(-1).view(torch.uint8)[place * tensor.element_size()] ^= 1
            found.add(checksum({**weights, name: changed}))
    swapped = weights["fp32"].clone()
    swapped[0, 0], swapped[2, 1] = weights["fp32"][2, 1], weights["fp32"][0, 0]
    found |= {
        checksum({**weights, "fp32": swapped}),
        checksum({**weights, "fp32": weights["fp32"].view(5, 3)}),
        checksum({**weights, "odd": weights["odd"].view(torch.float16)}),
        checksum({name: tensor for name, tensor in weights.items() if name != "empty"}),
        checksum({"renamed" if name == "odd" else name: tensor for name, tensor in weights.items()}),
        checksum({}),
    }
    assert wanted not in found
    assert len(found) == sum(tensor.numel() for tensor in weights.values()) + 6
    digest = WeightDigest()
    digest.add("a", weights["odd"])
    with pytest.raises(ValueError, match="a arrived twice"):
        digest.add("a", weights["odd"])


# -- what the learner offers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [0, 3])
def test_a_sender_offers_every_parameter_once_as_it_said(model: Path, stage: int) -> None:
    """vLLM's own check of a source runs over it."""
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerWeightTransferEngine

    from rlkit.learner.sender import Source

    learner = build_learner(model, zero_stage=stage)
    source = Source(learner, LIMIT)
    offered = dict(NCCLTrainerWeightTransferEngine._checked_iter(source, source.metadata()))
    assert len(offered) == len(source.metadata())
    from transformers import AutoModelForCausalLM

    wanted = dict(AutoModelForCausalLM.from_pretrained(model).named_parameters())
    assert offered.keys() == wanted.keys()
    assert all(torch.equal(offered[name], wanted[name]) for name in wanted)
    first = source.digest.hexdigest()
    assert first == checksum(offered)
    learner.update(groups := make_groups(), grpo_advantages(groups))
    assert sum(1 for _ in source) == len(wanted)
    assert source.digest.hexdigest() != first


def test_zero_3_gathers_a_bucket_at_a_time(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import deepspeed

    gathered: list[int] = []
    real = deepspeed.zero.GatheredParameters

    def recorded(parameters: Any, **options: Any) -> Any:
        gathered.append(sum(p.ds_numel * p.element_size() for p in parameters))
        return real(parameters, **options)

    learner = build_learner(model, zero_stage=3)
    monkeypatch.setattr(deepspeed.zero, "GatheredParameters", recorded)
    names = [name for name, _ in learner.named_weights(LIMIT)]
    sizes = {meta.name: meta.bytes for meta in learner.weight_metas()}
    assert names == list(sizes)
    assert gathered == [sum(meta.bytes for meta in bucket) for bucket in buckets(learner.weight_metas(), LIMIT)]
    assert len(gathered) > 5 and max(gathered) == max(sizes.values()) > LIMIT


# -- room on the GPU -------------------------------------------------------------------------------------------------


def train(learner: PolicyLearner, seed: int) -> None:
    groups = make_groups(seed=seed)
    learner.update(groups, grpo_advantages(groups))


@pytest.mark.parametrize(
    ("stage", "dtype"),
    [
        pytest.param(1, "float32", marks=pytest.mark.slow),
        pytest.param(2, "float32", marks=pytest.mark.slow),
        pytest.param(3, "float32", marks=pytest.mark.slow),
        pytest.param(1, "bfloat16", marks=pytest.mark.slow),
        (3, "bfloat16"),
    ],
)
def test_offloading_changes_nothing(model: Path, stage: int, dtype: str) -> None:
    """On a CPU nothing moves, but everything that DeepSpeed takes apart and links again must be whole afterwards."""
    undisturbed, disturbed = (build_learner(model, zero_stage=stage, dtype=dtype) for _ in range(2))
    for step in range(3):
        weights = weights_of(disturbed)
        offload(disturbed.engine)
        assert disturbed.engine.optimizer.offloaded_states
        readable = weights_of(disturbed)  # a replaced engine may need them now
        assert all(torch.equal(weights[name], readable[name]) for name in weights)
        reload(disturbed.engine)
        assert not disturbed.engine.optimizer.offloaded_states
        train(undisturbed, step)
        train(disturbed, step)
        trained = weights_of(disturbed)
        assert not all(torch.equal(weights[name], trained[name]) for name in weights)
    one, two = full_state(undisturbed.engine), full_state(disturbed.engine)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_there_is_no_offloading_without_zero(model: Path) -> None:
    with pytest.raises(ValueError, match="only with ZeRO"):
        offload(build_learner(model).engine)


# -- which way, and who makes room -----------------------------------------------------------------------------------


def config_of(tmp_path: Path, *overrides: str) -> RunConfig:
    return load_config(["reward=rule", f"run_dir={tmp_path / 'run'}", "dry_run=true", *overrides]).config


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        ([], "object_store"),
        (["cluster.weight_transfer=gloo"], "gloo"),
        (["cluster=single_gpu"], "ipc"),
        (["cluster=multi_gpu"], "ipc"),
        (["cluster=single_gpu", "cluster.placement=apart"], "nccl"),
        (["cluster=single_gpu", "rollout.tensor_parallel_size=2"], "object_store"),
        (["cluster=single_gpu", "rollout.tensor_parallel_size=2", "learner.ranks=2"], "ipc"),
        (["cluster=single_gpu", "rollout.tensor_parallel_size=2", "cluster.placement=apart"], "nccl"),
        (["cluster=multi_gpu", "rollout.workers=2", "rollout.tensor_parallel_size=4"], "ipc"),
        (["cluster=multi_gpu", "rollout.workers=3", "rollout.tensor_parallel_size=4"], "object_store"),
        (["cluster=multi_gpu", "learner.ranks=4"], "object_store"),
        (["cluster=multi_gpu", "rollout.workers=4"], "ipc"),
        (["cluster=multi_gpu", "cluster.weight_transfer=object_store"], "object_store"),
    ],
)
def test_the_way_follows_from_device_and_placement(tmp_path: Path, overrides: list[str], wanted: str) -> None:
    config = config_of(tmp_path, *overrides)
    assert weight_route(config.cluster, config.rollout, config.learner, config.model) == wanted


@pytest.mark.parametrize(
    ("overrides", "who"),
    [
        ([], set()),
        (["cluster=single_gpu"], {"engines", "learner", "critic"}),
        (["cluster=single_gpu", "learner.zero_stage=0", "learner.dtype=float32"], {"engines", "critic"}),
        (["cluster=single_gpu", "rollout.sleep=never"], {"learner", "critic"}),
        (["cluster=single_gpu", "trainer.max_staleness=1"], set()),
        (["cluster=single_gpu", "cluster.placement=apart"], set()),
        (["cluster=multi_gpu"], {"engines", "learner", "critic"}),
        (["cluster=multi_node", "critic.offload=never"], {"engines", "learner"}),
        (["cluster=multi_gpu", "learner.offload=never", "rollout.workers=4"], {"engines", "critic"}),
        (["cluster=multi_gpu", "rollout.tensor_parallel_size=2", "cluster.placement=apart"], set()),
    ],
)
def test_who_makes_room_follows_from_the_preset(tmp_path: Path, overrides: list[str], who: set[str]) -> None:
    config = config_of(tmp_path, *overrides)
    found = {
        "engines": engines_sleep(config),
        "learner": offloads(config, config.learner),
        "critic": offloads(config, config.critic),
    }
    assert {name for name, does in found.items() if does} == who


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["cluster.weight_transfer=nccl"], "weight_transfer=nccl: is for GPUs"),
        (["cluster.weight_transfer=ipc"], "weight_transfer=ipc: is for GPUs"),
        (["cluster=single_gpu", "cluster.weight_transfer=gloo"], "goes from CPU to CPU"),
        (["cluster=single_gpu", "cluster.weight_transfer=nccl"], "cannot join processes that share a GPU"),
        (["cluster=single_gpu", "cluster.placement=apart", "cluster.weight_transfer=ipc"], "they share none"),
        (["cluster=multi_gpu", "learner.ranks=4", "cluster.weight_transfer=ipc"], "learner.ranks=4 is less"),
        (
            ["cluster=single_gpu", "rollout.tensor_parallel_size=2", "cluster.weight_transfer=ipc"],
            "each of the engines' 2 GPUs (rollout.workers=1 x rollout.tensor_parallel_size=2), but learner.ranks=1",
        ),
        (
            ["cluster=multi_gpu", "rollout.tensor_parallel_size=2", "cluster.strategy=STRICT_SPREAD"],
            "cluster.strategy=STRICT_SPREAD: puts every GPU of a colocated run on a different node",
        ),
        (["cluster.weight_bucket_mib=64"], "weight_bucket_mib=64: has no effect"),
        (["cluster.weight_transfer=ncll"], "did you mean nccl"),
        (["cluster.weight_transfer=gloo", "cluster.weight_bucket_mib=0"], "at least 1"),
        (["rollout.sleep=always"], "rollout.sleep=always: makes room on a GPU that sampler and learner share"),
        (["learner.offload=always"], "learner.offload=always: makes room on a GPU"),
        (["cluster=single_gpu", "rollout.sleep=always", "trainer.max_staleness=2"], "take turns"),
        (["cluster=single_gpu", "critic.offload=always", "critic.zero_stage=0"], "set critic.zero_stage to 1"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        config_of(tmp_path, *overrides)
    assert message in str(refused.value)
    assert str(refused.value).count("\n  - ") == 1, str(refused.value)


def test_the_plan_says_who_makes_room_for_whom(tmp_path: Path) -> None:
    resolved = load_config(["reward=rule", f"run_dir={tmp_path / 'run'}", "cluster=single_gpu", "algorithm=ppo"])
    lines = {line.what: line.amount for line in plan(resolved) if line.area == "handover"}
    assert lines == {
        "weights to the engines": "by CUDA IPC, in buckets of 512 MiB",
        "while the learner works": "the engines sleep",
        "while the engines sample": "in host memory: learner and critic",
    }


@pytest.mark.parametrize(
    ("overrides", "engines", "gpus"),
    [
        (
            [],
            "8 vLLM engines, 2 CPU threads each, 0.5 GPU each",
            "8; an engine and the ranks with its number share one",
        ),
        (
            ["rollout.workers=2", "rollout.tensor_parallel_size=4"],
            "2 vLLM engines, 2 CPU threads each, 0.5 of each of its 4 GPUs",
            "8; engine 0 with ranks 0 to 3, engine 1 with ranks 4 to 7",
        ),
        (
            ["rollout.workers=2", "rollout.tensor_parallel_size=4", "cluster.placement=apart"],
            "2 vLLM engines, 2 CPU threads each, 4 GPU each",
            None,
        ),
        (["algorithm=sft"], "none: the data have the responses", "8"),
    ],
)
def test_the_plan_says_who_shares_which_gpus(
    tmp_path: Path, overrides: list[str], engines: str, gpus: str | None
) -> None:
    resolved = load_config([f"run_dir={tmp_path / 'run'}", "cluster=multi_gpu", *BATCH, *overrides])
    lines = {line.what: line.amount for line in plan(resolved) if line.area == "actors"}
    assert (lines["rollout"], lines.get("GPUs")) == (engines, gpus)
