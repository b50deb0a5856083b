"""Placement, without torch: GPUs per actor, the weights' route, who sleeps. Only this module resolves `auto`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from algorithms.base import Algorithm
from rlkit.config.lora import LoraConfig
from rlkit.config.messages import ConfigIssue, Issues
from rlkit.config.parts import import_part
from rlkit.config.schema import (
    ClusterConfig,
    CriticConfig,
    EvaluationConfig,
    LearnerConfig,
    ModelConfig,
    RolloutConfig,
    RunConfig,
    TrainerConfig,
)


@dataclass(frozen=True)
class GpuShares:
    """GPUs of one actor of each kind; a value below 1 is a share of a GPU. All 0 on CPU."""

    engine: float
    """Apart: the number of an engine's GPUs. Colocated: its share of each of its GPUs."""
    learner: float
    critic: float
    rewards: float
    """Of all reward workers together; 0 for a reward that loads no model here (a program, or a server's client)."""


def gpu_shares(config: RunConfig) -> GpuShares:
    """Return the GPU shares. Colocated, an engine, a rank, a critic rank and the rewards fit on one GPU together."""
    if config.cluster.device == "cpu":
        return GpuShares(0.0, 0.0, 0.0, 0.0)
    judged = _reward_uses_gpu(config)
    if config.cluster.placement == "apart":
        return GpuShares(float(config.rollout.tensor_parallel_size), 1.0, 1.0, 1.0 if judged else 0.0)
    return GpuShares(0.5, 0.3, 0.1, 0.1 if judged else 0.0)


def colocated_slots(config: RunConfig, critic_ranks: int) -> int:
    """Return the slots for colocated actors, on CUDA one GPU each: enough for all engines' GPUs and all ranks."""
    return max(config.rollout.workers * config.rollout.tensor_parallel_size, config.learner.ranks, critic_ranks)


def has_engines(rollout: RolloutConfig, evaluation: EvaluationConfig) -> bool:
    return rollout.source != "data" or evaluation.generate


def asks_reward(rollout: RolloutConfig, algorithm: Algorithm) -> bool:
    """Whether a reward scores the responses."""
    return rollout.judge == "always" or (algorithm.needs().rewards and rollout.source != "data")


def reads_recorded_labels(rollout: RolloutConfig, algorithm: Algorithm) -> bool:
    return rollout.source == "data" and algorithm.needs().labels and not asks_reward(rollout, algorithm)


def references_are_cached(rollout: RolloutConfig, algorithm: Algorithm) -> bool:
    """Whether references are cached: recorded responses are the same in every epoch, so a fixed reference needs only
    one pass."""
    stays = algorithm.needs().reference_policy and not algorithm.config.reference_every_steps
    return stays and rollout.source == "data"


def sampled_path(config: RunConfig) -> str:
    """Return the path of the model that the engines run."""
    return config.rollout.source_path or config.model.path


def _reward_uses_gpu(config: RunConfig) -> bool:
    cls = import_part("reward", config.reward["_target_"])
    own = {key: value for key, value in config.reward.items() if key != "_target_"}
    return bool(cls.traits(cls.Config(**own)).uses_gpu)


def longest_response(rollout: RolloutConfig, evaluation: EvaluationConfig) -> int:
    """Return how many tokens an engine must have room for after a prompt."""
    return max(rollout.max_response_tokens, evaluation.max_response_tokens or 0)


def samples_together(rollout: RolloutConfig, algorithm: Algorithm) -> int:
    """Return how many samples the learner must compute in one micro-batch."""
    group = 2 if rollout.source == "data" else algorithm.config.samples_per_prompt
    return {"any": 1, "pairs": 2, "full_group": group}[algorithm.needs().layout]


def longest_episode(config: RunConfig) -> int:
    """Return how many tokens all rows of an episode may have together, as a sample is computed in one pass."""
    cls = import_part("algorithm", config.algorithm["_target_"])
    algorithm = cls(cls.Config(**{key: value for key, value in config.algorithm.items() if key != "_target_"}))
    longest = config.learner.tokens_per_microbatch // samples_together(config.rollout, algorithm)
    return min(longest, config.critic.tokens_per_microbatch) if algorithm.needs().critic else longest


WeightRoute = Literal["object_store", "gloo", "nccl", "ipc"]
"""How weights get from the learner to the engines."""


def element_bytes(dtype: str, cuda: bool) -> int:
    return 4 if dtype == "float32" or (dtype == "auto" and not cuda) else 2


def weight_route(
    cluster: ClusterConfig, rollout: RolloutConfig, learner: LearnerConfig, model: ModelConfig
) -> WeightRoute:
    """Return the route. `auto` on GPUs: CUDA IPC if every engine's every GPU has a rank, NCCL if none has, else the
    object store. An adapter always goes through the object store."""
    if published_adapter(cluster, rollout, model) is not None:
        return "object_store"
    if cluster.weight_transfer != "auto":
        return cluster.weight_transfer
    if cluster.device == "cpu":
        return "object_store"
    if not shares_gpus(cluster):
        return "nccl"
    return "ipc" if _engine_gpus(rollout) <= learner.ranks else "object_store"


def published_adapter(cluster: ClusterConfig, rollout: RolloutConfig, model: ModelConfig) -> LoraConfig | None:
    """Return the adapter if the engines get only the adapter and keep the weights that they loaded at the start."""
    if model.lora is None or rollout.source == "model":
        return None
    exact = element_bytes(rollout.dtype, cluster.device == "cuda") == 4
    merges = exact if model.lora.publish == "auto" else model.lora.publish == "merged"
    return None if merges else model.lora


def sleep_level(config: RunConfig) -> int:
    """Return 1 if sleeping engines keep their weights in host memory, 2 if they drop them and get all weights again."""
    return 2 if published_adapter(config.cluster, config.rollout, config.model) is None else 1


def shares_gpus(cluster: ClusterConfig) -> bool:
    """Whether engine i with t GPUs shares those of ranks i*t to i*t + t-1."""
    return cluster.device == "cuda" and cluster.placement == "colocated"


def _engine_gpus(rollout: RolloutConfig) -> int:
    return rollout.workers * rollout.tensor_parallel_size


def engines_sleep(config: RunConfig) -> bool:
    rollout = config.rollout
    if rollout.source == "model":
        return False
    if rollout.sleep == "auto":
        return _take_turns(config.cluster, rollout, config.trainer)
    return rollout.sleep == "always"


def offloads(config: RunConfig, section: LearnerConfig) -> bool:
    """Whether the ranks of a section (learner, critic) free their memory while the engines sample."""
    if section.offload == "auto":
        return _take_turns(config.cluster, config.rollout, config.trainer) and section.zero_stage > 0
    return section.offload == "always"


def _take_turns(cluster: ClusterConfig, rollout: RolloutConfig, trainer: TrainerConfig) -> bool:
    return shares_gpus(cluster) and trainer.max_staleness == 0 and rollout.source == "policy"


def weights_can_travel(
    cluster: ClusterConfig, rollout: RolloutConfig, learner: LearnerConfig, model: ModelConfig
) -> Issues:
    key, route = "cluster.weight_transfer", cluster.weight_transfer
    if route not in ("auto", "object_store") and published_adapter(cluster, rollout, model) is not None:
        yield ConfigIssue(
            key,
            "is for whole weights; an adapter goes through the object store: use auto, or model.lora.publish=merged",
        )
    elif route in ("nccl", "ipc") and cluster.device == "cpu":
        yield ConfigIssue(key, "is for GPUs; with cluster.device=cpu use object_store or gloo (or auto)")
    elif route == "gloo" and cluster.device == "cuda":
        yield ConfigIssue(key, "goes from CPU to CPU; with cluster.device=cuda use nccl, ipc or object_store (or auto)")
    elif route == "nccl" and shares_gpus(cluster):
        yield ConfigIssue(
            key,
            "cannot join processes that share a GPU, as engines and ranks do with cluster.placement=colocated; use ipc "
            "(or auto), or cluster.placement=apart",
        )
    elif route == "ipc" and not shares_gpus(cluster):
        yield ConfigIssue(
            key,
            "hands over memory of a GPU that engine and rank share; they share none with cluster.placement=apart: use "
            "nccl (or auto)",
        )
    elif route == "ipc" and _engine_gpus(rollout) > learner.ranks:
        yield ConfigIssue(
            key,
            f"needs a learner rank on each of the engines' {_engine_gpus(rollout)} GPUs "
            f"(rollout.workers={rollout.workers} x rollout.tensor_parallel_size={rollout.tensor_parallel_size}), but "
            f"learner.ranks={learner.ranks} is less; use object_store (or auto), or as many ranks",
        )
    elif (
        cluster.weight_bucket_mib != ClusterConfig().weight_bucket_mib
        and weight_route(cluster, rollout, learner, model) == "object_store"
    ):
        yield ConfigIssue(
            "cluster.weight_bucket_mib", f"has no effect: weights go whole through the object store ({key}={route})"
        )


def engines_fit_on_nodes(cluster: ClusterConfig, rollout: RolloutConfig) -> Issues:
    """The GPUs of a colocated engine are reserved one by one and must be on one node."""
    if shares_gpus(cluster) and rollout.tensor_parallel_size > 1 and cluster.strategy == "STRICT_SPREAD":
        yield ConfigIssue(
            "cluster.strategy",
            "puts every GPU of a colocated run on a different node, but the GPUs of an engine "
            f"(rollout.tensor_parallel_size={rollout.tensor_parallel_size}) must be on one; use PACK, STRICT_PACK or "
            "SPREAD",
        )


def phases_make_room(
    trainer: TrainerConfig,
    cluster: ClusterConfig,
    rollout: RolloutConfig,
    learner: LearnerConfig,
    critic: CriticConfig,
) -> Issues:
    """Sleeping and offloading must make room for another process, and the freed memory must not be in use."""
    asked = {"rollout.sleep": rollout.sleep, "learner.offload": learner.offload, "critic.offload": critic.offload}
    stages = {"learner.offload": learner.zero_stage, "critic.offload": critic.zero_stage}
    for key, value in asked.items():
        if value != "always":
            continue
        if rollout.source != "policy":
            yield ConfigIssue(
                key,
                f"is for sampler and learner that take turns, which they do not with rollout.source={rollout.source}: "
                "use never",
            )
        elif not shares_gpus(cluster):
            yield ConfigIssue(
                key,
                "makes room on a GPU that sampler and learner share; they share none with cluster.device=cpu or "
                "cluster.placement=apart: use auto or never",
            )
        elif trainer.max_staleness > 0:
            yield ConfigIssue(
                key,
                "needs sampler and learner to take turns, but with "
                f"trainer.max_staleness={trainer.max_staleness} both work at once; use auto or never, or "
                "trainer.max_staleness=0",
            )
        elif stages.get(key) == 0:
            section = key.partition(".")[0]
            yield ConfigIssue(key, f"works only with DeepSpeed's ZeRO; set {section}.zero_stage to 1 or more")
