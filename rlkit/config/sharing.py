"""How sampler and learner share GPUs: the way weights travel, and who makes room for whom. Nothing here loads torch.

`auto` is decided here and nowhere else, from device and placement; what is named and cannot work is refused.
"""

from __future__ import annotations

from typing import Literal

from rlkit.config.finding import Finding, Findings
from rlkit.config.schema import ClusterConfig, CriticConfig, LearnerConfig, RolloutConfig, RunConfig, TrainerConfig

Way = Literal["object_store", "gloo", "nccl", "ipc"]
"""How weights get from the learner to the engines."""


def weight_way(cluster: ClusterConfig, rollout: RolloutConfig, learner: LearnerConfig) -> Way:
    """The way the weights go.

    `auto` on GPUs: CUDA IPC where every GPU of every engine has a rank, NCCL where none has, else the object store:
    each process of an engine reads the memory of the rank on its own GPU, and NCCL wants each of its processes on
    another GPU.
    """
    if cluster.weight_transfer != "auto":
        return cluster.weight_transfer
    if cluster.device == "cpu":
        return "object_store"
    if not shares_gpus(cluster):
        return "nccl"
    return "ipc" if _engine_gpus(rollout) <= learner.ranks else "object_store"


def shares_gpus(cluster: ClusterConfig) -> bool:
    """Whether engines stand on the GPUs of ranks: engine i of t GPUs on those of ranks i*t to i*t + t-1."""
    return cluster.device == "cuda" and cluster.placement == "colocated"


def _engine_gpus(rollout: RolloutConfig) -> int:
    return rollout.workers * rollout.tensor_parallel_size


def engines_sleep(config: RunConfig) -> bool:
    """Whether the engines give up their memory while the learner works."""
    rollout = config.rollout
    if rollout.sleep == "auto":
        return _take_turns(config.cluster, rollout, config.trainer)
    return rollout.sleep == "always"


def offloads(config: RunConfig, section: LearnerConfig) -> bool:
    """Whether the ranks of a section (learner, critic) give up their memory while the engines sample."""
    if section.offload == "auto":
        return _take_turns(config.cluster, config.rollout, config.trainer) and section.zero_stage > 0
    return section.offload == "always"


def _take_turns(cluster: ClusterConfig, rollout: RolloutConfig, trainer: TrainerConfig) -> bool:
    return shares_gpus(cluster) and trainer.max_staleness == 0


def weights_can_travel(cluster: ClusterConfig, rollout: RolloutConfig, learner: LearnerConfig) -> Findings:
    """The way that was asked for exists where the actors stand."""
    key, way = "cluster.weight_transfer", cluster.weight_transfer
    if way in ("nccl", "ipc") and cluster.device == "cpu":
        yield Finding(key, "is for GPUs; with cluster.device=cpu use object_store or gloo (or auto)")
    elif way == "gloo" and cluster.device == "cuda":
        yield Finding(key, "goes from CPU to CPU; with cluster.device=cuda use nccl, ipc or object_store (or auto)")
    elif way == "nccl" and shares_gpus(cluster):
        yield Finding(
            key,
            "cannot join processes that share a GPU, as engines and ranks do with cluster.placement=colocated; use ipc "
            "(or auto), or cluster.placement=apart",
        )
    elif way == "ipc" and not shares_gpus(cluster):
        yield Finding(
            key,
            "hands over memory of a GPU that engine and rank share; they share none with cluster.placement=apart: use "
            "nccl (or auto)",
        )
    elif way == "ipc" and _engine_gpus(rollout) > learner.ranks:
        yield Finding(
            key,
            f"needs a learner rank on every GPU of the engines, {_engine_gpus(rollout)} "
            f"(rollout.workers={rollout.workers} x rollout.tensor_parallel_size={rollout.tensor_parallel_size}), and "
            f"learner.ranks={learner.ranks} is less; use object_store (or auto), or as many ranks",
        )
    elif (
        cluster.weight_bucket_mib != ClusterConfig().weight_bucket_mib
        and weight_way(cluster, rollout, learner) == "object_store"
    ):
        yield Finding(
            "cluster.weight_bucket_mib", f"has no effect: weights go whole through the object store ({key}={way})"
        )


def engines_fit_on_nodes(cluster: ClusterConfig, rollout: RolloutConfig) -> Findings:
    """The GPUs of a colocated engine are reserved one by one, and belong on one node."""
    if shares_gpus(cluster) and rollout.tensor_parallel_size > 1 and cluster.strategy == "STRICT_SPREAD":
        yield Finding(
            "cluster.strategy",
            "puts every GPU of a colocated run on another node, and the GPUs of an engine "
            f"(rollout.tensor_parallel_size={rollout.tensor_parallel_size}) belong on one; use PACK, STRICT_PACK or "
            "SPREAD",
        )


def phases_make_room(
    trainer: TrainerConfig,
    cluster: ClusterConfig,
    rollout: RolloutConfig,
    learner: LearnerConfig,
    critic: CriticConfig,
) -> Findings:
    """Sleeping and offloading give room to somebody, and nobody needs what was given up."""
    asked = {"rollout.sleep": rollout.sleep, "learner.offload": learner.offload, "critic.offload": critic.offload}
    stages = {"learner.offload": learner.zero_stage, "critic.offload": critic.zero_stage}
    for key, value in asked.items():
        if value != "always":
            continue
        if not shares_gpus(cluster):
            yield Finding(
                key,
                "makes room on a GPU that sampler and learner share; they share none with cluster.device=cpu or "
                "cluster.placement=apart: use auto or never",
            )
        elif trainer.max_staleness > 0:
            yield Finding(
                key,
                f"wants sampler and learner to take turns, and with trainer.max_staleness={trainer.max_staleness} both "
                "work at once; use auto or never, or trainer.max_staleness=0",
            )
        elif stages.get(key) == 0:
            section = key.partition(".")[0]
            yield Finding(key, f"is DeepSpeed's, which has it with ZeRO only; set {section}.zero_stage to 1 or more")
