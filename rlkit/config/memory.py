"""Peak memory of every process of a run, predicted from the model's shape and the configuration, without torch.

Bytes are listed under what they hold. How DeepSpeed 0.19.8 holds a model: `deepspeed/runtime/zero/stage_1_and_2.py`,
`stage3.py`. Compared with measured peaks on CPUs (`benchmarks/memory.py`, docs/results.md); not measured on GPUs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from algorithms.base import REFERENCE
from rewards.base import TrainableReward
from rlkit.config.activations import Parts, activations, head, kept, layer_inputs
from rlkit.config.lora import adapter_parameters
from rlkit.config.parts import ResolvedRun, import_part
from rlkit.config.plan import (
    asks_reward,
    element_bytes,
    engines_sleep,
    offloads,
    references_are_cached,
    sampled_path,
    shares_gpus,
    sleep_level,
)
from rlkit.config.schema import LearnerConfig, RolloutConfig
from rlkit.config.store import bundle_elements, policy_shape, step_bytes, stored_bytes
from rlkit.models.folder import ModelShape, check_model_folder

GIB, MIB = 2**30, 2**20
REDUCE_ELEMENTS = 2**27
"""`reduce_bucket_size` (`rlkit/learner/engine.py`)."""
GATHER_ELEMENTS, STEP_ELEMENTS = 10**9, 10**9
"""DeepSpeed's defaults for ZeRO 3: `max_live_parameters`, `sub_group_size`."""
GATHERED = 2**29
"""Bytes of full weights gathered at a time to be saved or packed (`rlkit/learner/policy.py`)."""
BASES = {"driver": 0.46, "ray": 0.45, "engine": 0.75, "rank": 0.55, "reward": 0.2, "model": 0.55}
BASES["environment"] = 0.1
"""GiB that a process holds on a CPU without model or data, measured. `ray`: Ray's own processes together; `model`: a
reward that loads a model."""
IMPORTED = 0.45
"""GiB of a rank that has imported torch, transformers and DeepSpeed and computed nothing yet; measured."""
CUDA_HOST = 3.0
"""GiB of host memory of a process with a CUDA build of torch and a CUDA context. An estimate."""
CUDA_CONTEXT = 1.0
"""GiB of GPU memory per process: context, libraries, NCCL. An estimate."""
ENGINE_ASLEEP = 2.0
"""GiB of GPU memory that a sleeping engine keeps: context, CUDA graphs, NCCL. An estimate."""
ENGINE_WORKS = 2.0
"""GiB of an engine's share used for activations and CUDA graphs instead of the key-value cache. An estimate."""
FRAGMENTS = 0.08
"""Share of an update's temporary memory that torch's GPU allocator cannot reuse. An estimate."""


@dataclass(frozen=True)
class Phase:
    """The memory of a process at its peak in one phase of a step."""

    host: Parts = field(default_factory=dict)
    device: Parts = field(default_factory=dict)
    """On each of its GPUs."""


Phases = dict[str, Phase]


def total(parts: Mapping[str, float]) -> float:
    return sum(parts.values())


def size_text(count: float) -> str:
    for unit, scale in (("GiB", GIB), ("MiB", MIB), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:.0f} B"


def _stage(section: LearnerConfig, width: int) -> int:
    """Return the ZeRO stage in use: in bf16, stage 1 runs as 2 (`rlkit/learner/engine.py`)."""
    return 2 if width == 2 and section.zero_stage == 1 else section.zero_stage


def resting(shape: ModelShape, section: LearnerConfig, width: int, cuda: bool) -> Parts:
    """Return what a rank holds between updates, after the first one."""
    trained, ranks, stage = shape.trained, section.ranks, _stage(section, width)
    parts = {"weights": width * shape.whole / (ranks if stage == 3 else 1)}
    if stage:
        parts["fp32 masters"] = 4 * trained / ranks
    parts["Adam's moments"] = 8 * trained / (ranks if stage else 1)
    if stage == 3:  # buffers that are never freed; on a CPU untouched pages cost nothing
        parts["gradients"] = 4 * trained / ranks
        parts["reduction bucket"] = width * (REDUCE_ELEMENTS if cuda else min(trained, REDUCE_ELEMENTS))
    return parts


def backward(shape: ModelShape, section: LearnerConfig, width: int, cuda: bool) -> Parts:
    """Return what adds to `resting` during the last micro-batch: gradients of earlier ones, and DeepSpeed's buckets."""
    trained, ranks, stage = shape.trained, section.ranks, _stage(section, width)
    bucket = REDUCE_ELEMENTS if cuda else min(trained, REDUCE_ELEMENTS)  # on a CPU untouched pages cost nothing
    parts: Parts = {}
    if stage < 2:
        parts["gradients"] = width * trained  # whole; partitioned at the end
    elif stage == 2:
        parts["gradients"] = 4 * trained / ranks * (2 if width == 4 else 1)  # in fp32 their sum and the new ones
    if stage == 2:
        # Its flat copy is made after the logits are freed (measured on CPUs; on a GPU it is counted to be safe).
        parts["reduction bucket"] = (2.0 if cuda else 1.0) * width * bucket
    elif stage == 3:
        parts["flat copy of the bucket"] = width * bucket
    if stage == 3 and ranks > 1:
        parts["gathered parameters"] = width * min(shape.whole, GATHER_ELEMENTS)
    return parts | activations(shape, section, width) | head(shape, section)


def stepping(shape: ModelShape, section: LearnerConfig, width: int, cuda: bool) -> Parts:
    """Return what adds to `resting` at the end of the last backward pass or in the optimizer, without activations."""
    trained, ranks, stage = shape.trained, section.ranks, _stage(section, width)
    share = trained / (ranks if stage else 1)
    # AdamW's denominator on a CPU. On a GPU AdamW is fused, and the norm casts one gradient after another to fp64.
    widest = 8 * min(float(shape.largest), share)
    spare: Parts = {"temporaries of the step": widest if cuda or stage == 0 else 8 * share}
    if stage == 0:
        return {"gradients": 4 * trained, **spare}
    if stage == 3:
        group = min(share, STEP_ELEMENTS)
        spare = {"temporaries of the step": 8 * float(shape.largest) / ranks if cuda else 8 * group}
        return {"fp32 copy of gradients": 4 * group, **spare}
    if stage == 1:
        bucket = 2 * 4 * min(trained, REDUCE_ELEMENTS)  # with its flat copy
        reducing = {"gradients": 4 * trained - bucket / 2 + 4 * share, "reduction bucket": bucket}
        return max(reducing, {"fp32 copy of gradients": 8 * share, **spare}, key=total)
    if width == 2:
        return {"gradients": 4 * share, **spare}
    return {"fp32 copy of gradients": 8 * share, **spare}


def rank_phases(
    shape: ModelShape,
    section: LearnerConfig,
    *,
    cuda: bool,
    frozen: Sequence[ModelShape] = (),
    offloaded: bool = False,
    bundle: float = 0,
    bucket: float = GATHERED,
) -> Phases:
    """Return the phases of one rank of a trained model: load, update, publish (`bundle`: elements that go through the
    object store), save, and rest (on GPUs, while the engines sample). `frozen`: models that only run forward."""
    width = element_bytes(section.dtype, cuda)
    parameters, ranks, stage = shape.whole, section.ranks, _stage(section, width)
    base: Parts = {"process": (CUDA_HOST if cuda else BASES["rank"]) * GIB}
    whole = width * parameters
    others = sum(one.parameters or 0 for one in frozen) * width
    still: Parts = {"frozen models": others / (ranks if stage == 3 else 1)} if frozen else {}
    still |= resting(shape, section, width, cuda)
    working = max(backward(shape, section, width, cuda), stepping(shape, section, width, cuda), key=total)
    saved: Parts = {"a bucket in fp32": min(4 * parameters, 2.0 * GATHERED)}
    fresh = {name: size for name, size in still.items() if name not in ("Adam's moments", "reduction bucket")}
    reuse = 0.0 if cuda else kept(shape, section)
    copied = cuda or stage == 3 or shape.adapter is not None  # else the bundle holds the weights themselves
    packed: Parts = {"bundle of the weights": width * bundle * copied} if bundle else {"a bucket": min(whole, bucket)}
    if not cuda:
        freed: Parts = {"freed, kept by malloc": reuse}
        late = {**stepping(shape, section, width, cuda), **freed}
        working = max(backward(shape, section, width, cuda), late, key=total)
        gathered: Parts = {"gathered parameters": min(whole, GATHERED)} if stage == 3 and ranks > 1 else {}
        return {
            "load": Phase({"process": IMPORTED * GIB, **_mapped(fresh, whole, stage, ranks)}),
            "update": Phase({**base, **still, **working}),
            "publish": Phase({**base, **still, **freed, **packed, **gathered}),
            "save": Phase({**base, **still, **freed, **saved}),
        }
    context: Parts = {"CUDA": CUDA_CONTEXT * GIB}
    lost: Parts = {"fragments": FRAGMENTS * total(working)}
    rests = dict(still)
    host = dict(base)
    if offloaded:
        rests = {"weights": still["weights"]} if stage == 3 else {}  # `rlkit/learner/engine.py:offload`
        waiting = {name: size for name, size in still.items() if name not in (*rests, "reduction bucket")}
        host |= {f"offloaded {name}": size for name, size in waiting.items()}
    file: Parts = {"weights of the file": min(whole, GATHERED) if stage == 3 else whole}
    moved: Parts = {"inputs of layers": layer_inputs(shape, section, width)} if section.offload_activations else {}
    return {
        "load": Phase({**base, **file}, {**context, **fresh, "gradients": 4 * shape.trained / ranks}),
        "update": Phase(base | moved, {**context, **still, **working, **lost}),
        "publish": Phase(base | (packed if bundle else {}), {**context, **still, **({} if bundle else packed)}),
        "save": Phase(base | saved, {**context, **still, "a bucket": min(whole, GATHERED)}),
        "rest": Phase(host, {**context, **rests}),
    }


def _mapped(parts: Parts, whole: float, stage: int, ranks: int) -> Parts:
    """Return what is in memory on a CPU, where weights stay pages of the file until they are read or copied."""
    if stage == 0:
        return {"weights": parts["weights"]} if ranks > 1 else {}
    parts = {name: size for name, size in parts.items() if name != "frozen models" or stage == 3}
    return {**parts, "weights of the file": whole}


def engine_phases(
    shape: ModelShape, rollout: RolloutConfig, gpu: float | None, *, cuda: bool, sleeps: bool, keeps: bool = False
) -> Phases:
    """Return the phases of a rollout worker: sample, publish and asleep. `gpu`: bytes of one GPU. `keeps`: whether it
    keeps its weights in host memory while it sleeps."""
    width = element_bytes(rollout.dtype, cuda)
    whole = width * shape.whole
    if not cuda:
        process: Parts = {"process": BASES["engine"] * GIB, "weights": whole + _packed_head(shape, width)}
        process["key-value cache"] = rollout.memory_gib * GIB
        return {"sample": Phase(process), "publish": Phase(process)}
    host: Parts = {"process": CUDA_HOST * GIB, **({"sleeping weights": whole} if sleeps and keeps else {})}
    weights = whole / rollout.tensor_parallel_size
    asleep: Parts = {"CUDA of the engine": ENGINE_ASLEEP * GIB}
    share = rollout.gpu_memory_utilization * gpu if gpu else weights + ENGINE_WORKS * GIB
    awake: Parts = {"weights of the engine": weights, "engine: cache, activations, graphs": max(0.0, share - weights)}
    return {
        "sample": Phase(host, awake),
        "publish": Phase(host, {**asleep, "weights of the engine": weights} if sleeps else awake),
        "update": Phase(host, asleep if sleeps else awake),
    }


def _packed_head(shape: ModelShape, width: int) -> float:
    """Return the bytes of the repacked head: on a CPU vLLM holds it in addition to the embedding, even if tied."""
    return float(width * shape.vocabulary * shape.hidden)


@dataclass(frozen=True)
class Process:
    name: str
    count: int
    phases: Phases
    on_gpu: int = 0
    """How many of these processes share one GPU; 0: they use no GPU."""

    def host(self) -> float:
        """Return the peak bytes of host memory of one process."""
        return max(total(phase.host) for phase in self.phases.values())


def learner_phases(run: ResolvedRun) -> Phases:
    config, cuda, algorithm = run.config, run.config.cluster.device == "cuda", run.make_algorithm()
    frozen = algorithm.needs().frozen_models(references_are_cached(config.rollout, algorithm))
    if config.model.lora is not None:  # the model itself, with its adapter off
        frozen.discard(REFERENCE)
    return rank_phases(
        policy_shape(config),
        config.learner,
        cuda=cuda,
        frozen=[check_model_folder(config.model.path if name == REFERENCE else name) for name in sorted(frozen)],
        offloaded=cuda and offloads(config, config.learner),
        bundle=bundle_elements(config),
        bucket=2.0 * config.cluster.weight_bucket_mib * MIB,
    )


def processes(run: ResolvedRun, gpu: float | None) -> list[Process]:
    """Return all processes of a run. `gpu`: bytes of one GPU, if known."""
    config, cuda = run.config, run.config.cluster.device == "cuda"
    groups = step_bytes(run)
    alone: Phases = {
        "run": Phase({"process": BASES["driver"] * GIB, "groups": (2 + config.trainer.max_staleness) * groups})
    }
    parts = [Process("driver", 1, alone)]
    if config.cluster.address is None:
        held = {"process": BASES["ray"] * GIB, "object store": stored_bytes(run)}
        parts.append(Process("Ray", 1, {"run": Phase(held)}))
    if config.rollout.workers:
        sampled = check_model_folder(sampled_path(config))
        keeps = sleep_level(config) == 1
        engine = engine_phases(sampled, config.rollout, gpu, cuda=cuda, sleeps=engines_sleep(config), keeps=keeps)
        parts.append(Process("rollout engine", config.rollout.workers, engine, int(cuda)))
    environment = run.environment_config
    if environment is not None and environment.placement == "worker":
        beside: Phases = {"sample": Phase({"process": BASES["environment"] * GIB})}
        parts.append(Process("environment worker", config.rollout.workers * environment.workers, beside))
    parts.append(Process("learner rank", config.learner.ranks, learner_phases(run), int(cuda)))
    if run.make_algorithm().needs().critic:
        valued = check_model_folder(config.critic.path or config.model.path)
        offloaded = cuda and offloads(config, config.critic)
        critic = rank_phases(valued, config.critic, cuda=cuda, offloaded=offloaded)
        parts.append(Process("critic rank", config.critic.ranks, critic, int(cuda)))
    return [*parts, *_rewards(run, cuda)]


def _rewards(run: ResolvedRun, cuda: bool) -> list[Process]:
    """Return the reward's workers, with the models that the reward or its parts load, and the verifier's, if any."""
    section, workers = run.config.reward, run.reward_config.workers
    parts = section.get("parts")
    named = [part for part in parts.values() if isinstance(part, Mapping)] if isinstance(parts, Mapping) else [section]
    models = [size for part in named if (size := _model_bytes(part, cuda))]
    passes = sum(min(GIB, size + 64 * MIB) for size in models)
    held: Parts = {"weights": sum(models), "activations": passes} if models else {}
    process: Parts = {"process": (CUDA_HOST if cuda and models else BASES["model" if models else "reward"]) * GIB}
    phase = Phase(process, held) if cuda else Phase(process | held)
    shared = -(-workers // max(1, run.config.learner.ranks)) if models and cuda else 0
    asked = asks_reward(run.config.rollout, run.make_algorithm())
    rewards = [Process("reward worker", workers, {"score": phase}, shared)] if asked else []
    same = run.reward_class is run.verifier_class and run.reward_config == run.verifier_config
    if (asked and same) or not run.config.rollout.workers or run.config.rollout.source == "model":
        return rewards
    verifier: Phases = {"judge": Phase({"process": BASES["reward"] * GIB})}
    return [*rewards, Process("verifier", run.verifier_config.workers, verifier)]


def _model_bytes(section: Mapping[str, Any], cuda: bool) -> float | None:
    """Return the bytes of a reward's model: trained in fp32 with its reference, or frozen. None: no model is loaded."""
    cls, path = import_part("reward", section["_target_"]), section.get("model_path")
    own = {key: value for key, value in section.items() if key in cls.Config.model_fields}
    if not isinstance(path, str) or not cls.traits(cls.Config(**own)).uses_gpu:
        return None
    width = element_bytes(str(section.get("dtype", "auto")), cuda)
    whole, lora = check_model_folder(path).whole, getattr(cls.Config(**own), "lora", None)
    if not issubclass(cls, TrainableReward):
        return width * whole
    return (16 + width) * whole if lora is None else width * whole + 16 * adapter_parameters(path, lora)


def gpu_phases(run: ResolvedRun, gpu: float | None) -> dict[str, Parts]:
    """Return what the fullest GPU holds in each phase, by process and part. Colocated: all processes that share it;
    apart: by kind of process."""
    there = [process for process in processes(run, gpu) if process.on_gpu]
    if not shares_gpus(run.config.cluster):
        return {f"{process.name}, {name}": phase.device for process in there for name, phase in process.phases.items()}
    return {
        name: {
            f"{process.name}: {part}": process.on_gpu * size
            for process in there
            for part, size in _in_phase(process.phases, name).device.items()
        }
        for name in ("load", "sample", "update", "publish", "save")
    }


def _in_phase(phases: Phases, name: str) -> Phase:
    """Return what a process does in a phase of the run: engines sleep while ranks load and save, ranks rest while
    engines sample, and a reward's memory stays."""
    other = {"load": "update", "save": "update", "sample": "rest"}.get(name, name)
    return phases.get(name) or phases.get(other) or next(iter(phases.values()))
