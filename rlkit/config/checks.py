"""Checks of how parts fit together: small pure functions, each about one combination.

A check runs if the sections and parts that its parameters name are each valid on their own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from algorithms.base import Algorithm
from rlkit.config.adapters import ADAPTERS
from rlkit.config.diagnostics import diagnostics_act
from rlkit.config.engine import ENGINE
from rlkit.config.environments import ENVIRONMENTS
from rlkit.config.heldout import HELDOUT
from rlkit.config.limits import LIMITS
from rlkit.config.long_contexts import LONG_CONTEXTS
from rlkit.config.messages import ConfigIssue, Issues
from rlkit.config.parts import Part
from rlkit.config.places import PLACES
from rlkit.config.plan import (
    engines_fit_on_nodes,
    longest_response,
    phases_make_room,
    samples_together,
    weights_can_travel,
)
from rlkit.config.process_rewards import PROCESS_REWARDS
from rlkit.config.sampling import SAMPLING
from rlkit.config.schema import (
    ClusterConfig,
    CriticConfig,
    EvaluationConfig,
    LearnerConfig,
    ModelConfig,
    RolloutConfig,
    TrainerConfig,
)
from rlkit.config.sources import SOURCES
from rlkit.config.staleness import STALENESS
from rlkit.data.base import DataSource
from rlkit.experience.filters import BufferConfig
from rlkit.models.folder import ModelFolderError, ModelShape, check_model_folder, model_folder
from rlkit.models.usable import known_run, refusals


def run_checks(available: Mapping[str, Any]) -> list[ConfigIssue]:
    """Return the issues of all checks whose parameters are all in `available` (section or part by name)."""
    issues: list[ConfigIssue] = []
    for check in CHECKS:
        names = list(inspect.signature(check).parameters)
        if all(name in available for name in names):
            issues += check(**{name: available[name] for name in names})
    return issues


def group_is_large_enough(algorithm: Algorithm, rollout: RolloutConfig) -> Issues:
    least = algorithm.needs().min_samples_per_prompt
    if rollout.source != "data" and algorithm.config.samples_per_prompt < least:
        name = type(algorithm).__name__
        yield ConfigIssue(
            "algorithm.samples_per_prompt",
            f"{name} compares the samples of a prompt with each other and needs at least {least}",
        )


def reward_finds_its_columns(reward: Part, data: DataSource) -> Issues:
    traits, provided = reward.cls.traits(reward.config), data.provides()
    required = [
        ("references", traits.references),
        ("answer", traits.answer),
        *((name, True) for name in traits.columns),
    ]
    lacking = [name for name, needed in required if needed and name not in provided]
    if lacking:
        yield ConfigIssue(
            "reward",
            f"{reward.cls.__name__} needs {', '.join(lacking)} with every prompt, but {type(data).__name__} provides "
            f"{', '.join(sorted(provided)) or 'nothing besides prompts'}; choose other data or another reward",
        )


def algorithm_finds_its_answers(algorithm: Algorithm, data: DataSource) -> Issues:
    if algorithm.needs().answer and "answer" not in data.provides():
        yield ConfigIssue(
            "algorithm",
            f"{type(algorithm).__name__} needs a gold answer with every prompt, but {type(data).__name__} provides "
            "none; choose other data, or another algorithm",
        )


def reward_can_compare(algorithm: Algorithm, reward: Part, rollout: RolloutConfig) -> Issues:
    if rollout.source == "data":
        return  # the data say how many responses a prompt has
    needed = reward.cls.traits(reward.config).samples
    responses = algorithm.config.samples_per_prompt + algorithm.needs().greedy_response
    if responses < needed:
        yield ConfigIssue(
            "reward",
            f"{reward.cls.__name__} compares the responses to a prompt with each other and needs at least {needed} of "
            f"them; there are {responses} (algorithm.samples_per_prompt)",
        )


def raw_scores_are_normalised(algorithm: Algorithm, reward: Part) -> Issues:
    """Logits may spread over 10 in one group and over 0.1 in the next, which would then hardly count."""
    if reward.cls.traits(reward.config).raw_scores and not algorithm.normalises():
        yield ConfigIssue(
            "reward",
            f"{reward.cls.__name__} gives a model's raw scores, and {type(algorithm).__name__} does not divide by "
            "their spread, so prompts whose scores spread widely outweigh others; GRPO and PPO do so by default, or "
            "the reward can: 'reward=[NAME]' 'reward.shaping=[group_normalise]' (one sample per prompt: [standardise])",
            warning=True,
        )


def data_is_usable(data: DataSource) -> Issues:
    for message in data.check():
        yield ConfigIssue("data", message)


def reward_is_usable(reward: Part) -> Issues:
    for message in reward.cls.check(reward.config):
        yield ConfigIssue("reward", message)


def model_is_usable(
    model_shape: ModelShape | ModelFolderError,
    model: ModelConfig,
    cluster: ClusterConfig,
    rollout: RolloutConfig,
    evaluation: EvaluationConfig,
) -> Issues:
    if isinstance(model_shape, ModelFolderError):
        yield ConfigIssue("model.path", str(model_shape))
        return
    folder = model_folder(model.path)
    longest = rollout.max_prompt_tokens + longest_response(rollout, evaluation)
    reasons = refusals(
        folder,
        device=cluster.device,
        longest=longest,
        chat_template=model.chat_template is not None,
        trust_remote_code=model.trust_remote_code,
    )
    for refusal in reasons:
        yield ConfigIssue("model.path", refusal)
    if known_run(folder) == "rows":
        yield ConfigIssue(
            "model.path",
            "its layers carry state from token to token, or it has attention code of its own: the learner runs each "
            "sequence as a separate row, which is exact but slower (docs/models.md)",
            warning=True,
        )


def model_is_long_enough(
    model_shape: ModelShape | ModelFolderError, rollout: RolloutConfig, evaluation: EvaluationConfig
) -> Issues:
    if isinstance(model_shape, ModelFolderError) or model_shape.max_positions is None:
        return
    responses = longest_response(rollout, evaluation)
    total = rollout.max_prompt_tokens + responses
    if total > model_shape.max_positions:
        section = "rollout" if responses == rollout.max_response_tokens else "evaluation"
        yield ConfigIssue(
            f"{section}.max_response_tokens",
            f"{rollout.max_prompt_tokens} prompt + {responses} response tokens are {total}, but the "
            f"model has {model_shape.max_positions} positions; lower rollout.max_prompt_tokens or this",
        )


def cache_holds_a_sequence(
    model_shape: ModelShape | ModelFolderError,
    rollout: RolloutConfig,
    evaluation: EvaluationConfig,
    cluster: ClusterConfig,
) -> Issues:
    """On CPU the key-value cache has a fixed size. vLLM would refuse it only after loading the model."""
    if isinstance(model_shape, ModelFolderError) or cluster.device != "cpu":
        return
    tokens = rollout.max_prompt_tokens + longest_response(rollout, evaluation)
    needed = tokens * model_shape.kv_bytes_per_token(4 if rollout.dtype in ("auto", "float32") else 2) / 2**30
    if needed > rollout.memory_gib:
        yield ConfigIssue("rollout.memory_gib", f"one sequence of {tokens} tokens needs {needed:.2f} GiB of cache")


def minibatches_are_equal(trainer: TrainerConfig, learner: LearnerConfig, algorithm: Algorithm) -> Issues:
    """Each optimizer step takes an equal share of whole groups, and every rank gets some samples of that share."""
    together = algorithm.needs().layout != "any"  # ranks are dealt whole groups
    yield from _unequal_minibatches("learner", learner, trainer, 1 if together else algorithm.config.samples_per_prompt)


def _unequal_minibatches(section: str, config: LearnerConfig, trainer: TrainerConfig, units: int) -> Issues:
    """`units`: pieces of a group that different ranks may compute."""
    prompts, parts = trainer.prompts_per_step, config.minibatches_per_step
    if prompts % parts:
        divisors = [n for n in range(1, prompts + 1) if prompts % n == 0]
        near = min(divisors, key=lambda n: abs(n - parts))
        yield ConfigIssue(
            f"{section}.minibatches_per_step",
            f"trainer.prompts_per_step={prompts} cannot be divided into {parts} equal mini-batches of whole groups; "
            f"{near} would fit",
        )
    elif prompts // parts * units < config.replicas:
        what = "samples" if units > 1 else "groups"
        yield ConfigIssue(
            f"{section}.ranks",
            f"a mini-batch has {prompts // parts * units} {what} (of trainer.prompts_per_step={prompts} / "
            f"{section}.minibatches_per_step={parts} groups), which is less than one for each of {config.replicas} "
            f"{'ranks' if config.sequence_parallel == 1 else 'groups of ranks that share sequences'}",
        )


def microbatch_holds_what_belongs_together(
    algorithm: Algorithm, learner: LearnerConfig, rollout: RolloutConfig
) -> Issues:
    """The longest sample (pair, group) must fit into one forward and backward pass."""
    layout = algorithm.needs().layout
    samples = samples_together(rollout, algorithm)
    unit = {"any": "sample", "pairs": "pair of samples", "full_group": f"group of {samples} samples"}[layout]
    needed = rollout.max_prompt_tokens + samples * rollout.max_response_tokens
    if needed > learner.tokens_per_microbatch:
        yield ConfigIssue(
            "learner.tokens_per_microbatch",
            f"the longest {unit} has {needed} tokens (rollout.max_prompt_tokens + {samples} x "
            f"rollout.max_response_tokens) and must fit into one micro-batch; set at least {needed}",
        )


def group_filters_leave_something(buffer: BufferConfig) -> Issues:
    low, high = buffer.min_group_reward, buffer.max_group_reward
    if low is not None and high is not None and low > high:
        yield ConfigIssue(
            "buffer.min_group_reward", f"is above buffer.max_group_reward={high}: every group would be rejected"
        )


def groups_can_differ(buffer: BufferConfig, algorithm: Algorithm, rollout: RolloutConfig) -> Issues:
    if rollout.source == "data":
        filters = [name for name, value in buffer if value != getattr(BufferConfig(), name)]
        if filters and "data" in algorithm.needs().sources:
            yield ConfigIssue(
                f"buffer.{filters[0]}", "filters sampled groups, but with rollout.source=data nothing is sampled"
            )
    elif buffer.drop_equal_rewards and algorithm.config.samples_per_prompt == 1:
        yield ConfigIssue("buffer.drop_equal_rewards", "rejects every group with algorithm.samples_per_prompt=1")


def schedule_fits(trainer: TrainerConfig, learner: LearnerConfig) -> Issues:
    yield from _unfit_schedule("learner", learner, trainer)


def _unfit_schedule(section: str, config: LearnerConfig, trainer: TrainerConfig) -> Issues:
    updates = trainer.total_steps * config.optimizer_steps
    if trainer.total_epochs is None and config.warmup_steps >= updates and config.warmup_steps > 0:
        yield ConfigIssue(
            f"{section}.warmup_steps",
            f"the run has {updates} optimizer steps (trainer.total_steps x {section}.minibatches_per_step x "
            "epochs_per_step), so the learning rate would never reach its peak",
        )
    if config.schedule == "constant" and config.min_learning_rate_ratio > 0:
        yield ConfigIssue(
            f"{section}.min_learning_rate_ratio",
            f"has no effect with {section}.schedule=constant; choose linear or cosine, or leave it out",
        )


def half_precision_has_masters(cluster: ClusterConfig, learner: LearnerConfig) -> Issues:
    yield from _lacking_masters("learner", learner, cluster)


def _lacking_masters(section: str, config: LearnerConfig, cluster: ClusterConfig) -> Issues:
    if cluster.device == "cuda" and config.dtype != "float32" and config.zero_stage == 0:
        yield ConfigIssue(
            f"{section}.zero_stage",
            f"keeps no fp32 master weights at 0, but bfloat16 ({section}.dtype={config.dtype} with "
            "cluster.device=cuda) needs them; set at least 1",
        )


def placement_acts(cluster: ClusterConfig) -> Issues:
    if cluster.device == "cpu" and cluster.placement != ClusterConfig().placement:
        yield ConfigIssue("cluster.placement", "has no effect with cluster.device=cpu")


def critic_fits(
    algorithm: Algorithm, critic: CriticConfig, trainer: TrainerConfig, rollout: RolloutConfig, cluster: ClusterConfig
) -> Issues:
    defaults = CriticConfig()
    changed = [name for name in CriticConfig.model_fields if getattr(critic, name) != getattr(defaults, name)]
    if not algorithm.needs().critic:
        for name in changed:
            if name not in ("zero_stage", "ranks", "offload", "gradient_checkpointing"):  # set by cluster options
                yield ConfigIssue(f"critic.{name}", f"has no effect: {type(algorithm).__name__} has no critic")
        return
    if critic.path is not None:
        try:
            check_model_folder(critic.path)
        except ModelFolderError as error:
            yield ConfigIssue("critic.path", str(error))
    for name in ("logit_elements_per_chunk", "reference_cache"):
        if name in changed:
            yield ConfigIssue(f"critic.{name}", "has no effect: a critic computes values, not logits or log-probs")
    yield from _unequal_minibatches("critic", critic, trainer, algorithm.config.samples_per_prompt)
    yield from _unfit_schedule("critic", critic, trainer)
    yield from _lacking_masters("critic", critic, cluster)
    if cluster.device == "cpu" and critic.dtype == "bfloat16":
        yield ConfigIssue("critic.dtype", "is for GPUs; with cluster.device=cpu use float32 (or auto)")
    if trainer.total_epochs is None and critic.policy_waits_steps >= trainer.total_steps:
        yield ConfigIssue(
            "critic.policy_waits_steps",
            f"the run has trainer.total_steps={trainer.total_steps}, so the policy would never learn",
        )
    longest = rollout.max_prompt_tokens + rollout.max_response_tokens
    if longest > critic.tokens_per_microbatch:
        yield ConfigIssue(
            "critic.tokens_per_microbatch",
            f"the longest sample has {longest} tokens and must fit into one micro-batch; set at least {longest}",
        )


def cpu_has_its_limits(cluster: ClusterConfig, rollout: RolloutConfig, learner: LearnerConfig) -> Issues:
    if cluster.device != "cpu":
        return
    defaults = RolloutConfig()
    if rollout.tensor_parallel_size > 1:
        yield ConfigIssue(
            "rollout.tensor_parallel_size", "splits an engine over GPUs; with cluster.device=cpu it must be 1"
        )
    if rollout.dtype == "float16":
        yield ConfigIssue("rollout.dtype", "is for GPUs; with cluster.device=cpu use float32 (or auto)")
    if learner.dtype == "bfloat16":
        yield ConfigIssue("learner.dtype", "is for GPUs; with cluster.device=cpu use float32 (or auto)")
    if rollout.gpu_memory_utilization != defaults.gpu_memory_utilization:
        yield ConfigIssue(
            "rollout.gpu_memory_utilization", "has no effect with cluster.device=cpu; use rollout.memory_gib"
        )


def gpu_ignores_cpu_options(cluster: ClusterConfig, rollout: RolloutConfig) -> Issues:
    if cluster.device == "cuda" and rollout.memory_gib != RolloutConfig().memory_gib:
        yield ConfigIssue(
            "rollout.memory_gib", "has no effect with cluster.device=cuda; use rollout.gpu_memory_utilization"
        )


def joined_cluster_has_its_own_store(cluster: ClusterConfig) -> Issues:
    usual = (None, 0.5)  # 0.5 was the default, so it is in older files
    if cluster.address is not None and cluster.object_store_gib not in usual:
        yield ConfigIssue(
            "cluster.object_store_gib", "has no effect with cluster.address: that Ray already has its store"
        )


CHECKS: tuple[Callable[..., Issues], ...] = (
    group_is_large_enough,
    model_is_usable,
    data_is_usable,
    reward_is_usable,
    reward_finds_its_columns,
    algorithm_finds_its_answers,
    raw_scores_are_normalised,
    reward_can_compare,
    model_is_long_enough,
    cache_holds_a_sequence,
    minibatches_are_equal,
    microbatch_holds_what_belongs_together,
    group_filters_leave_something,
    groups_can_differ,
    schedule_fits,
    half_precision_has_masters,
    critic_fits,
    placement_acts,
    engines_fit_on_nodes,
    weights_can_travel,
    phases_make_room,
    cpu_has_its_limits,
    gpu_ignores_cpu_options,
    joined_cluster_has_its_own_store,
    *STALENESS,
    *SAMPLING,
    *ENGINE,
    *PROCESS_REWARDS,
    diagnostics_act,
    *LONG_CONTEXTS,
    *ADAPTERS,
    *ENVIRONMENTS,
    *HELDOUT,
    *SOURCES,
    *PLACES,
    *LIMITS,
)
