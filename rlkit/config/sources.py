"""Where responses come from: whether algorithm, data and reward fit with `rollout.source`, and what has no effect."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from algorithms.base import POLICY, REFERENCE, Algorithm
from rlkit.config.messages import ConfigIssue, Issues
from rlkit.config.parts import Part
from rlkit.config.plan import asks_reward, has_engines
from rlkit.config.schema import EvaluationConfig, ModelConfig, RolloutConfig, TrainerConfig
from rlkit.data.base import DataError, DataSource
from rlkit.models.folder import ModelFolderError, check_model_folder, model_folder

RECORDED = "data=pairs, data=responses or data=chat bring recorded ones"
LEARNERS = (
    "Recorded pairs train algorithm=dpo, simpo, orpo and others; responses with labels kto or bco; all of them, and "
    "conversations, sft"
)
SAMPLED = ("samples_per_prompt",)
"""Options of an algorithm that speak of sampling."""


def algorithm_learns_from_the_source(algorithm: Algorithm, rollout: RolloutConfig) -> Issues:
    sources = algorithm.needs().sources
    if rollout.source not in sources:
        yield ConfigIssue(
            "rollout.source",
            f"gives responses that {type(algorithm).__name__} cannot learn from; it takes "
            f"{' or '.join(f'rollout.source={source}' for source in sources)}"
            + (f". {LEARNERS}" if rollout.source == "data" else ""),
        )


def data_have_responses(algorithm: Algorithm, rollout: RolloutConfig, data: DataSource) -> Issues:
    provided, needs = data.provides(), algorithm.needs()
    if needs.demonstrations and not provided & {"responses", "references"}:
        yield ConfigIssue(
            "data",
            f"{type(algorithm).__name__} also learns from the data's responses, and {type(data).__name__} has none; "
            f"{RECORDED}",
        )
    if rollout.source != "data":
        return
    if not provided & {"responses", "references"}:
        yield ConfigIssue(
            "data", f"{type(data).__name__} has no responses to learn from (rollout.source=data); {RECORDED}"
        )
    elif rollout.judge == "auto" and needs.pairs and not provided & {"pairs", "labels"}:
        yield ConfigIssue(
            "data",
            f"{type(algorithm).__name__} compares responses to a prompt, and {type(data).__name__} says of none that "
            "it is better: use data=pairs, or data=responses with labels or scores, or let a reward score them "
            "(rollout.judge=always reward=NAME)",
        )
    elif rollout.judge == "auto" and needs.labels and not provided & {"pairs", "labels"}:
        yield ConfigIssue(
            "data",
            f"{type(algorithm).__name__} learns from labels, and {type(data).__name__} gives none: use data=responses "
            "with data.label_column, or data=pairs",
        )


def prompts_have_something_to_compare(algorithm: Algorithm, rollout: RolloutConfig, data: DataSource) -> Issues:
    """In the first problems; responses without a rival are left out of every step."""
    needs, provided = algorithm.needs(), data.provides()
    if rollout.source != "data" or rollout.judge != "auto" or not needs.pairs or not provided & {"pairs", "labels"}:
        return
    try:
        problems = data.preview("train")
    except DataError:
        return  # reported with the data
    alone = [p for p in problems if not p.pairs and len({response.value for response in p.responses}) < 2]
    if problems and len(alone) == len(problems):
        yield ConfigIssue(
            "data",
            f"{type(algorithm).__name__} compares responses to a prompt, and none of the first {len(problems)} prompts "
            f"has two that differ in label or score (the first: {alone[0].origin}); algorithm=kto or algorithm=bco "
            "learns from single labelled responses",
        )
    elif alone:
        yield ConfigIssue(
            "data",
            f"{len(alone)} of the first {len(problems)} prompts have no two responses that differ in label or score, "
            f"and teach nothing (the first: {alone[0].origin})",
            warning=True,
        )


def labels_are_labels(algorithm: Algorithm, reward: Part) -> Issues:
    if algorithm.needs().labels and reward.cls.traits(reward.config).raw_scores:
        yield ConfigIssue(
            "reward",
            f"{type(algorithm).__name__} learns from labels, 0 (bad) to 1 (good), and {reward.cls.__name__} gives "
            "scores of any size; choose a reward that says right or wrong",
        )


def batches_are_large_enough(algorithm: Algorithm, trainer: TrainerConfig) -> Issues:
    least = algorithm.needs().min_prompts_per_step
    if trainer.prompts_per_step < least:
        yield ConfigIssue(
            "trainer.prompts_per_step", f"{type(algorithm).__name__} compares prompts of a step and needs {least}"
        )


def frozen_models_exist(algorithm: Algorithm, rollout: RolloutConfig, model: ModelConfig) -> Issues:
    named = {one.model: "algorithm" for one in algorithm.needs().passes.values()}
    if rollout.source_path is not None:
        named[rollout.source_path] = "rollout.source_path"
    for path, key in named.items():
        if path in (POLICY, REFERENCE):
            continue
        try:
            check_model_folder(path)
            own, other = (model_folder(name) / "tokenizer.json" for name in (model.path, path))
            if own.is_file() and other.is_file() and own.read_bytes() != other.read_bytes():
                yield ConfigIssue(
                    key,
                    f"{path} has another tokenizer than model.path={model.path} (their tokenizer.json differ), so the "
                    "same token ids are other texts to it",
                )
        except ModelFolderError as error:
            yield ConfigIssue(key, str(error))


ON_RECORDED = frozenset(
    f"rollout.{name}"
    for name in ("source", "source_path", "judge", "temperature", "max_prompt_tokens", "max_response_tokens", "steps")
)
"""Keys that do something, or have a check of their own, where nothing is sampled. The others are vLLM's."""


def source_options_act(
    algorithm: Algorithm, rollout: RolloutConfig, evaluation: EvaluationConfig, typed: AbstractSet[str]
) -> Issues:
    if (rollout.source_path is not None) != (rollout.source == "model"):
        yield ConfigIssue("rollout.source_path", "and rollout.source=model go together: set both")
    if rollout.source != "data":
        if evaluation.generate:
            yield ConfigIssue("evaluation.generate", "is for rollout.source=data; else evaluation samples anyhow")
        if rollout.workers == 0:
            yield ConfigIssue("rollout.workers", "must be at least 1: somebody must sample")
    if rollout.source == "policy" and rollout.judge == "always" and algorithm.needs().rewards:
        yield ConfigIssue("rollout.judge", "has no effect with rollout.source=policy: the reward scores every response")
    if not asks_reward(rollout, algorithm):
        for key in sorted(typed):
            if key == "reward" or key.startswith("reward."):
                why = "recorded responses bring their own labels" if rollout.source == "data" else "no reward is read"
                yield ConfigIssue(key, f"has no effect: {why}; with rollout.judge=always it scores the responses")
    if rollout.source == "data":
        for key in sorted(typed & {f"algorithm.{name}" for name in SAMPLED}):
            yield ConfigIssue(key, "has no effect with rollout.source=data: the data say how many responses there are")
    if has_engines(rollout, evaluation) and rollout.source != "model":
        return
    remedy = " (evaluation.generate=true does)" if rollout.source == "data" else ""
    for key in sorted(typed):
        of_engines = rollout.source == "data" and key.startswith("rollout.")
        if key.startswith(("verifier", "evaluation.")) or (of_engines and _option(key) not in ON_RECORDED):
            yield ConfigIssue(
                key, f"has no effect: the policy samples nothing with rollout.source={rollout.source}{remedy}"
            )


def _option(key: str) -> str:
    """Of a key that may be inside of an option."""
    return ".".join(key.split(".")[:2])


def epochs_or_steps(trainer: TrainerConfig, typed: AbstractSet[str]) -> Issues:
    if trainer.total_epochs is not None and "trainer.total_steps" in typed:
        yield ConfigIssue("trainer.total_steps", "and trainer.total_epochs exclude each other: set one")


def nothing_waits_for_engines(
    rollout: RolloutConfig, evaluation: EvaluationConfig, trainer: TrainerConfig, typed: AbstractSet[str]
) -> Issues:
    """Keys of other sections about a sampler that works beside the learner."""
    if rollout.source != "data":
        return
    if trainer.max_staleness:
        yield ConfigIssue("trainer.max_staleness", "has no effect with rollout.source=data: nothing is sampled; set 0")
    of_samples = () if has_engines(rollout, evaluation) else ("cluster.weight_",)
    for key in sorted(typed):
        if key.startswith(("trainer.mismatch_alarm", "trainer.max_mismatch", *of_samples)):
            yield ConfigIssue(key, "has no effect: no engine samples what is trained with rollout.source=data")


SOURCES = (
    algorithm_learns_from_the_source,
    data_have_responses,
    prompts_have_something_to_compare,
    labels_are_labels,
    batches_are_large_enough,
    frozen_models_exist,
    source_options_act,
    epochs_or_steps,
    nothing_waits_for_engines,
)
