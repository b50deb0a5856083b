"""What a run would do, without torch: GPUs per actor, the weights' route, batches, memory. `auto` is decided here
alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rewards.base import TrainableReward
from rlkit.config.messages import ConfigIssue, Issues
from rlkit.config.parts import ResolvedRun, import_part
from rlkit.config.schema import ClusterConfig, CriticConfig, LearnerConfig, RolloutConfig, RunConfig, TrainerConfig
from rlkit.models.folder import ModelShape, check_model_folder


@dataclass(frozen=True)
class GpuShares:
    """GPUs of one actor of each kind; below 1 a share of one. All 0 on CPU."""

    engine: float
    """Apart: all GPUs of one engine. Colocated: its share of each of its GPUs."""
    learner: float
    critic: float
    rewards: float
    """Of all reward workers together; 0 for a reward that loads no model here (a program, a server's client)."""


def gpu_shares(config: RunConfig) -> GpuShares:
    """Colocated, an engine, a rank, a critic rank and the rewards fit on one GPU together."""
    if config.cluster.device == "cpu":
        return GpuShares(0.0, 0.0, 0.0, 0.0)
    judged = _reward_uses_gpu(config)
    if config.cluster.placement == "apart":
        return GpuShares(float(config.rollout.tensor_parallel_size), 1.0, 1.0, 1.0 if judged else 0.0)
    return GpuShares(0.5, 0.3, 0.1, 0.1 if judged else 0.0)


def colocated_slots(config: RunConfig, critic_ranks: int) -> int:
    """Slots for colocated actors, on CUDA a GPU each: enough for every engine's GPUs and for every rank."""
    return max(config.rollout.workers * config.rollout.tensor_parallel_size, config.learner.ranks, critic_ranks)


def _reward_uses_gpu(config: RunConfig) -> bool:
    cls = import_part("reward", config.reward["_target_"])
    own = {key: value for key, value in config.reward.items() if key != "_target_"}
    return bool(cls.traits(cls.Config(**own)).uses_gpu)


WeightRoute = Literal["object_store", "gloo", "nccl", "ipc"]
"""How weights get from the learner to the engines."""


def weight_route(cluster: ClusterConfig, rollout: RolloutConfig, learner: LearnerConfig) -> WeightRoute:
    """`auto` on GPUs: CUDA IPC if every GPU of every engine has a rank, NCCL if none has, else the object store."""
    if cluster.weight_transfer != "auto":
        return cluster.weight_transfer
    if cluster.device == "cpu":
        return "object_store"
    if not shares_gpus(cluster):
        return "nccl"
    return "ipc" if _engine_gpus(rollout) <= learner.ranks else "object_store"


def shares_gpus(cluster: ClusterConfig) -> bool:
    """Whether engine i of t GPUs shares those of ranks i*t to i*t + t-1."""
    return cluster.device == "cuda" and cluster.placement == "colocated"


def _engine_gpus(rollout: RolloutConfig) -> int:
    return rollout.workers * rollout.tensor_parallel_size


def engines_sleep(config: RunConfig) -> bool:
    rollout = config.rollout
    if rollout.sleep == "auto":
        return _take_turns(config.cluster, rollout, config.trainer)
    return rollout.sleep == "always"


def offloads(config: RunConfig, section: LearnerConfig) -> bool:
    """Whether the ranks of a section (learner, critic) free their memory while the engines sample."""
    if section.offload == "auto":
        return _take_turns(config.cluster, config.rollout, config.trainer) and section.zero_stage > 0
    return section.offload == "always"


def _take_turns(cluster: ClusterConfig, rollout: RolloutConfig, trainer: TrainerConfig) -> bool:
    return shares_gpus(cluster) and trainer.max_staleness == 0


def weights_can_travel(cluster: ClusterConfig, rollout: RolloutConfig, learner: LearnerConfig) -> Issues:
    key, route = "cluster.weight_transfer", cluster.weight_transfer
    if route in ("nccl", "ipc") and cluster.device == "cpu":
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
            f"needs a learner rank on every GPU of the engines, {_engine_gpus(rollout)} "
            f"(rollout.workers={rollout.workers} x rollout.tensor_parallel_size={rollout.tensor_parallel_size}), and "
            f"learner.ranks={learner.ranks} is less; use object_store (or auto), or as many ranks",
        )
    elif (
        cluster.weight_bucket_mib != ClusterConfig().weight_bucket_mib
        and weight_route(cluster, rollout, learner) == "object_store"
    ):
        yield ConfigIssue(
            "cluster.weight_bucket_mib", f"has no effect: weights go whole through the object store ({key}={route})"
        )


def engines_fit_on_nodes(cluster: ClusterConfig, rollout: RolloutConfig) -> Issues:
    """The GPUs of a colocated engine are reserved one by one, and belong on one node."""
    if shares_gpus(cluster) and rollout.tensor_parallel_size > 1 and cluster.strategy == "STRICT_SPREAD":
        yield ConfigIssue(
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
) -> Issues:
    """Sleeping and offloading must make room for somebody, and nobody may need what was freed."""
    asked = {"rollout.sleep": rollout.sleep, "learner.offload": learner.offload, "critic.offload": critic.offload}
    stages = {"learner.offload": learner.zero_stage, "critic.offload": critic.zero_stage}
    for key, value in asked.items():
        if value != "always":
            continue
        if not shares_gpus(cluster):
            yield ConfigIssue(
                key,
                "makes room on a GPU that sampler and learner share; they share none with cluster.device=cpu or "
                "cluster.placement=apart: use auto or never",
            )
        elif trainer.max_staleness > 0:
            yield ConfigIssue(
                key,
                f"wants sampler and learner to take turns, and with trainer.max_staleness={trainer.max_staleness} both "
                "work at once; use auto or never, or trainer.max_staleness=0",
            )
        elif stages.get(key) == 0:
            section = key.partition(".")[0]
            yield ConfigIssue(
                key, f"is DeepSpeed's, which has it with ZeRO only; set {section}.zero_stage to 1 or more"
            )


GIB = 2**30
WEIGHT_ROUTES = {
    "object_store": "through Ray's object store, one copy per node",
    "gloo": "by gloo",
    "nccl": "by NCCL",
    "ipc": "by CUDA IPC",
}
"""`cluster.weight_transfer` in words."""


@dataclass(frozen=True)
class Line:
    area: str
    what: str
    amount: str


def plan(run: ResolvedRun) -> list[Line]:
    shape = check_model_folder(run.config.model.path)
    return [*_parts(run, shape), *_actors(run), *_handover(run), *_batches(run), *_memory(run, shape)]


def plan_text(lines: Sequence[Line]) -> str:
    areas = ["", *(line.area for line in lines)]
    return "\n".join(
        f"{line.area if line.area != before else '':<9}{line.what:<31}{line.amount}"
        for before, line in zip(areas, lines, strict=False)
    )


def _parts(run: ResolvedRun, shape: ModelShape) -> list[Line]:
    size = (
        "number of parameters unknown (no safetensors)"
        if shape.parameters is None
        else f"{shape.parameters:,} parameters"
    )
    return [
        Line("parts", "algorithm", run.config.algorithm["_target_"]),
        Line("parts", "reward", run.config.reward["_target_"]),
        *_reward_parts(run.config.reward),
        Line("parts", "data", run.config.data["_target_"]),
        Line("parts", "model", f"{run.config.model.path} ({size})"),
        Line("parts", "run folder", str(run.config.run_dir)),
    ]


def _reward_parts(section: Mapping[str, Any]) -> list[Line]:
    parts = section.get("parts")
    if not isinstance(parts, Mapping):
        return []
    return [
        Line("parts", f"reward {name}", f"{part['_target_']}, weight {part['weight']:g}")
        for name, part in parts.items()
        if isinstance(part, Mapping) and {"_target_", "weight"} <= set(part)
    ]


def _actors(run: ResolvedRun) -> list[Line]:
    config = run.config
    cuda = config.cluster.device == "cuda"
    threads = f"{config.cluster.threads_per_actor} CPU threads each"
    shares = gpu_shares(config)
    engines = f"{config.rollout.workers} vLLM {_plural('engine', config.rollout.workers)}, {threads}"
    ranks = f"{config.learner.ranks} DeepSpeed {_plural('rank', config.learner.ranks)}, {threads}"
    if cuda:
        width = config.rollout.tensor_parallel_size
        split = shares_gpus(config.cluster) and width > 1
        engines += f", {shares.engine:g} of each of its {width} GPUs" if split else f", {shares.engine:g} GPU each"
        ranks += f", {shares.learner:g} GPU each"
    rewards = run.reward_config.workers
    lines = [
        Line("actors", "rollout", engines),
        Line("actors", "learner", ranks),
        Line("actors", "reward", f"{rewards} {_plural('worker', rewards)} of {run.reward_class.__name__}"),
        Line("actors", "buffer", "1"),
    ]
    needs = run.make_algorithm().needs()
    if needs.critic:
        critics, gpus = config.critic.ranks, f", {shares.critic:g} GPU each" if cuda else ""
        lines.append(Line("actors", "critic", f"{critics} DeepSpeed {_plural('rank', critics)}, {threads}" + gpus))
    if needs.reference_policy:
        lines.append(Line("actors", "reference policy", "the initial policy, for its log-probs"))
    if shares_gpus(config.cluster):
        lines.append(Line("actors", "GPUs", _shared(config, config.critic.ranks if needs.critic else 0)))
    return lines


def _shared(config: RunConfig, critic_ranks: int) -> str:
    places, width = colocated_slots(config, critic_ranks), config.rollout.tensor_parallel_size
    if width == 1:
        return f"{places}; engine and ranks of equal number share one"
    engines = [f"engine {i} those of ranks {i * width} to {(i + 1) * width - 1}" for i in range(config.rollout.workers)]
    shown = engines if len(engines) <= 3 else [*engines[:2], "...", engines[-1]]
    return f"{places}; {', '.join(shown)}"


def _handover(run: ResolvedRun) -> list[Line]:
    config = run.config
    route = weight_route(config.cluster, config.rollout, config.learner)
    text = WEIGHT_ROUTES[route]
    if route != "object_store":
        text += f", in buckets of {config.cluster.weight_bucket_mib} MiB"
    lines = [Line("handover", "weights to the engines", text)]
    if config.cluster.device == "cuda":
        who = {"learner": offloads(config, config.learner)}
        if run.make_algorithm().needs().critic:
            who["critic"] = offloads(config, config.critic)
        waiting = " and ".join(name for name, does in who.items() if does) or "nobody"
        asleep = "sleep" if engines_sleep(config) else "keep their memory"
        lines.append(Line("handover", "while the learner works", f"the engines {asleep}"))
        lines.append(Line("handover", "while the engines sample", f"in the host's memory: {waiting}"))
    return lines


def _batches(run: ResolvedRun) -> list[Line]:
    trainer, learner, rollout = run.config.trainer, run.config.learner, run.config.rollout
    samples = run.algorithm_config.samples_per_prompt
    responses = trainer.prompts_per_step * samples
    per_update = trainer.prompts_per_step // learner.minibatches_per_step
    updates = trainer.total_steps * learner.minibatches_per_step
    most_tokens = trainer.prompts_per_step * (rollout.max_prompt_tokens + samples * rollout.max_response_tokens)
    return [
        Line("batches", "each step", f"{trainer.prompts_per_step} prompts x {samples} samples = {responses} responses"),
        Line("batches", "each optimizer step", f"{per_update} prompts = {per_update * samples} responses"),
        Line(
            "batches",
            "whole run",
            f"{trainer.total_steps} steps x {learner.minibatches_per_step} = {updates} optimizer steps, "
            f"{trainer.total_steps * responses:,} responses",
        ),
        Line(
            "batches",
            "tokens of a step",
            f"at most {most_tokens:,}, in micro-batches of up to {learner.tokens_per_microbatch:,}",
        ),
        *_staleness(run),
    ]


def _staleness(run: ResolvedRun) -> list[Line]:
    most = run.config.trainer.max_staleness
    if not most:
        return []
    how = getattr(run.algorithm_config, "rollout_correction", None)
    bound = getattr(run.algorithm_config, "largest_weight", None)
    weights = {
        "truncate": f"importance weights truncated at {bound}",
        "mask": f"importance weights, tokens above {bound} left out",
        "decoupled": "importance weights as they are",
    }.get(how or "", "no importance weights")
    return [Line("batches", "staleness", f"at most {most} {_plural('version', most)}; {weights}")]


def _memory(run: ResolvedRun, shape: ModelShape) -> list[Line]:
    cuda = run.config.cluster.device == "cuda"
    rollout, learner = run.config.rollout, run.config.learner
    lines = [Line("memory", "key-value cache, each engine", _cache(rollout, shape, cuda))]
    if shape.parameters is not None:
        sampler_bytes = shape.parameters * _element_bytes(rollout.dtype, cuda) / rollout.tensor_parallel_size
        lines.append(
            Line("memory", "weights, each GPU of an engine" if cuda else "weights, each engine", _size(sampler_bytes))
        )
        total = _learner_bytes(shape.parameters, learner, cuda)
        if run.make_algorithm().needs().reference_policy:
            total += shape.parameters * _element_bytes(learner.dtype, cuda)  # whole on every rank
        lines.append(Line("memory", f"learner, each rank (ZeRO {learner.zero_stage})", f"{_size(total)} + activations"))
    lines += [*_critic_memory(run, cuda), *_reward_memory(run, cuda)]
    lines.append(Line("memory", "logits, each chunk", _size(3 * 4 * learner.logit_elements_per_chunk)))
    return lines


def _critic_memory(run: ResolvedRun, cuda: bool) -> list[Line]:
    critic = run.config.critic
    if not run.make_algorithm().needs().critic:
        return []
    parameters = check_model_folder(critic.path or run.config.model.path).parameters
    if parameters is None:
        return []
    total = _learner_bytes(parameters, critic, cuda)
    return [Line("memory", f"critic, each rank (ZeRO {critic.zero_stage})", f"{_size(total)} + activations")]


def _reward_memory(run: ResolvedRun, cuda: bool) -> list[Line]:
    """Models that the reward or its parts load: trained in fp32 with their reference, or only used."""
    parts = run.config.reward.get("parts")
    named: dict[str, Mapping[str, Any]] = {"reward": run.config.reward}
    if isinstance(parts, Mapping):
        named = {f"reward {name}": part for name, part in parts.items() if isinstance(part, Mapping)}
    lines = []
    for name, section in named.items():
        cls, path = import_part("reward", section["_target_"]), section.get("model_path")
        own = {key: value for key, value in section.items() if key in cls.Config.model_fields}
        if not isinstance(path, str) or not cls.traits(cls.Config(**own)).uses_gpu:
            continue
        parameters = check_model_folder(path).parameters
        if parameters is not None:
            width = _element_bytes(str(section.get("dtype", "auto")), cuda)
            size = 16 + width if issubclass(cls, TrainableReward) else width
            lines.append(Line("memory", f"{name}, each worker", f"{_size(parameters * size)} + activations"))
    return lines


def _cache(rollout: RolloutConfig, shape: ModelShape, cuda: bool) -> str:
    """Upper bound: all concurrent samples at full length (in practice shared prompts count once)."""
    length = rollout.max_prompt_tokens + rollout.max_response_tokens
    sample = length * shape.kv_bytes_per_token(_element_bytes(rollout.dtype, cuda))
    full = f"{_size(sample)} for each of up to {rollout.max_concurrent_samples} samples at full length"
    cache = f"{rollout.gpu_memory_utilization:.0%} of the GPU" if cuda else _size(rollout.memory_gib * GIB)
    return f"{cache} given to the engine; {full}"


def _element_bytes(dtype: str, cuda: bool) -> int:
    return 4 if dtype == "float32" or (dtype == "auto" and not cuda) else 2


def _learner_bytes(parameters: int, learner: LearnerConfig, cuda: bool) -> float:
    """Weights, gradients and AdamW's state of one rank: 4 + 4 + 8 bytes per parameter in fp32; bf16 2 + 2, and 4 +
    8.

    Each ZeRO stage divides one more of them by the ranks.
    """
    width = _element_bytes(learner.dtype, cuda)
    weights, gradients, optimizer = width, width, 8 if width == 4 else 12
    stage, ranks = learner.zero_stage, learner.ranks
    shares = [
        weights / (ranks if stage >= 3 else 1),
        gradients / (ranks if stage >= 2 else 1),
        optimizer / (ranks if stage >= 1 else 1),
    ]
    return parameters * sum(shares)


def _plural(noun: str, count: int) -> str:
    return noun if count == 1 else f"{noun}s"


def _size(count: float) -> str:
    for unit, scale in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:.0f} B"
