"""Checks that algorithm, data and reward fit with `rollout.source`, the origin of responses, and that options act."""

from __future__ import annotations

import json
from collections.abc import Set as AbstractSet
from pathlib import Path

from algorithms.base import POLICY, REFERENCE, Algorithm
from rlkit.config.messages import ConfigIssue, Issues
from rlkit.config.parts import Part
from rlkit.config.plan import asks_reward, has_engines, reads_recorded_labels, references_are_cached
from rlkit.config.schema import EvaluationConfig, LearnerConfig, ModelConfig, RolloutConfig, TrainerConfig
from rlkit.data.base import DataError, DataSource
from rlkit.data.files import CHECKED_ROWS
from rlkit.data.mixture import Mixture
from rlkit.experience.filters import BufferConfig
from rlkit.models.folder import ModelFolderError, check_model_folder, model_folder

RECORDED = "data=pairs, data=responses and data=chat have recorded ones"
LEARNERS = (
    "Recorded pairs train algorithm=dpo, simpo, orpo and others; responses with labels train kto or bco; all of them, "
    "and conversations, train sft"
)
SAMPLED = ("samples_per_prompt",)
"""Options of an algorithm that concern sampling."""


def algorithm_learns_from_the_source(algorithm: Algorithm, rollout: RolloutConfig) -> Issues:
    sources = algorithm.needs().sources
    if rollout.source not in sources:
        yield ConfigIssue(
            "rollout.source",
            f"gives responses that {type(algorithm).__name__} cannot learn from; it takes "
            f"{' or '.join(f'rollout.source={source}' for source in sources)}"
            + (f". {LEARNERS}" if rollout.source == "data" else ""),
        )


def _lacking(data: DataSource, words: AbstractSet[str]) -> str:
    """Name the source that provides none of `words`; in a mixture, its sources that do not."""
    if not isinstance(data, Mixture):
        return type(data).__name__
    return ", ".join(f"data.sources.{name}" for name, part in data.parts.items() if not part.provides() & words)


def data_have_responses(algorithm: Algorithm, rollout: RolloutConfig, data: DataSource) -> Issues:
    provided, needs = data.provides(), algorithm.needs()
    nobody, unjudged = _lacking(data, {"responses", "references"}), _lacking(data, {"pairs", "labels"})
    if needs.demonstrations and not provided & {"responses", "references"}:
        yield ConfigIssue(
            "data",
            f"{type(algorithm).__name__} also learns from the data's responses, but {nobody} has none; {RECORDED}",
        )
    if rollout.source != "data":
        return
    if not provided & {"responses", "references"}:
        yield ConfigIssue("data", f"{nobody} has no responses to learn from (rollout.source=data); {RECORDED}")
    elif rollout.judge == "auto" and needs.pairs and not provided & {"pairs", "labels"}:
        yield ConfigIssue(
            "data",
            f"{type(algorithm).__name__} compares responses to a prompt, but {unjudged} does not say which are better: "
            "use data=pairs, or data=responses with labels or scores, or let a reward score them "
            "(rollout.judge=always reward=NAME)",
        )
    elif rollout.judge == "auto" and needs.labels and not provided & {"pairs", "labels"}:
        yield ConfigIssue(
            "data",
            f"{type(algorithm).__name__} learns from labels, but {unjudged} has none: use data=responses "
            "with data.label_column, or data=pairs",
        )


def prompts_have_something_to_compare(algorithm: Algorithm, rollout: RolloutConfig, data: DataSource) -> Issues:
    """Check the first problems: responses with nothing to compare them with are left out of every step."""
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
            f"{type(algorithm).__name__} compares responses to a prompt, but none of the first {len(problems)} prompts "
            f"has two that differ in label or score (the first: {alone[0].origin}); algorithm=kto or algorithm=bco "
            "learns from single labelled responses",
        )
    elif alone:
        yield ConfigIssue(
            "data",
            f"{len(alone)} of the first {len(problems)} prompts have no two responses that differ in label or score, "
            f"so they teach nothing (the first: {alone[0].origin})",
            warning=True,
        )


def labels_are_of_both_kinds(algorithm: Algorithm, rollout: RolloutConfig, data: DataSource) -> Issues:
    """Check the first problems: responses of one kind only move each other's reference point and teach no contrast."""
    if not reads_recorded_labels(rollout, algorithm):
        return
    try:
        responses = [response for problem in data.preview("train") for response in problem.responses]
    except DataError:
        return  # reported with the data
    name = type(algorithm).__name__
    no_label = next((response for response in responses if not 0 <= response.value <= 1), None)
    if no_label is not None:
        yield ConfigIssue(
            "data",
            f"{name} learns from labels, 0 (bad) to 1 (good), but {no_label.origin} has a score of {no_label.value:g}: "
            "name a column of true and false labels (data.label_column), or compare responses by their scores "
            "(algorithm=dpo)",
        )
    elif responses and len({response.value > 0.5 for response in responses}) < 2:
        kind, other = ("good", "bad") if responses[0].value > 0.5 else ("bad", "good")
        yield ConfigIssue(
            "data",
            f"{name} learns from good and bad responses, but all of the first {len(responses)} are {kind}: add {other} "
            "ones" + (", or imitate these (algorithm=sft data=chat)" if kind == "good" else ""),
            warning=len(responses) >= CHECKED_ROWS,
        )


def rows_are_noted(data: DataSource, dry_run: bool) -> Issues:
    for note in data.notes() if dry_run else ():  # the start reports it for all rows
        yield ConfigIssue("data", note, warning=True)


def labels_are_labels(algorithm: Algorithm, reward: Part) -> Issues:
    if algorithm.needs().labels and reward.cls.traits(reward.config).raw_scores:
        yield ConfigIssue(
            "reward",
            f"{type(algorithm).__name__} learns from labels, 0 (bad) to 1 (good), but {reward.cls.__name__} gives "
            "scores of any size; choose a reward that says right or wrong",
        )


def reward_gets_the_policy(reward: Part, rollout: RolloutConfig) -> Issues:
    if reward.cls.traits(reward.config).follows_policy and rollout.source != "policy":
        yield ConfigIssue(
            "reward",
            f"{reward.cls.__name__} takes the policy's weights after each step, but with "
            f"rollout.source={rollout.source} they are not sent; let it keep its own reference",
        )


def batches_are_large_enough(algorithm: Algorithm, trainer: TrainerConfig) -> Issues:
    least = algorithm.needs().min_prompts_per_step
    if trainer.prompts_per_step < least:
        yield ConfigIssue(
            "trainer.prompts_per_step",
            f"{type(algorithm).__name__} compares prompts of a step and needs at least {least}",
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
            if own.is_file() and other.is_file() and (token := _other_token(own, other)):
                yield ConfigIssue(
                    key,
                    f"{path} has a different tokenizer from model.path={model.path}, so the same token ids are other "
                    f"texts to it ({token})",
                )
        except ModelFolderError as error:
            yield ConfigIssue(key, str(error))


def _other_token(own: Path, other: Path) -> str | None:
    """Return the first token of one tokenizer.json that the other lacks under the same id. The files' text may differ,
    as each version of the library formats it differently."""
    if own.read_bytes() == other.read_bytes():
        return None
    try:
        mine, theirs = _tokens(own), _tokens(other)
    except (ValueError, KeyError, TypeError, AttributeError):
        return "their tokenizer.json files differ"
    different = (i for i in sorted(mine) if theirs.get(i) != mine[i])
    return next((f"{i}: {mine[i]!r}, there {theirs.get(i)!r}" for i in different), None)


def _tokens(file: Path) -> dict[int, str]:
    content = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    if isinstance(vocabulary, list):  # Unigram: tokens with scores
        tokens = {i: token for i, (token, *_) in enumerate(vocabulary)}
    else:
        tokens = {i: token for token, i in vocabulary.items()}
    return tokens | {token["id"]: token["content"] for token in content["added_tokens"]}


ON_RECORDED = frozenset(
    f"rollout.{name}"
    for name in ("source", "source_path", "judge", "temperature", "max_prompt_tokens", "max_response_tokens", "steps")
)
"""Keys that act, or have a check of their own, when nothing is sampled. The others concern vLLM."""


def source_options_act(
    algorithm: Algorithm, rollout: RolloutConfig, evaluation: EvaluationConfig, typed: AbstractSet[str]
) -> Issues:
    if (rollout.source_path is not None) != (rollout.source == "model"):
        yield ConfigIssue("rollout.source_path", "and rollout.source=model go together: set both")
    if rollout.source != "data":
        if evaluation.generate:
            yield ConfigIssue("evaluation.generate", "is for rollout.source=data; otherwise evaluation samples anyway")
        if rollout.workers == 0:
            yield ConfigIssue("rollout.workers", "must be at least 1: an engine must sample")
    if rollout.source == "policy" and rollout.judge == "always" and algorithm.needs().rewards:
        yield ConfigIssue("rollout.judge", "has no effect with rollout.source=policy: the reward scores every response")
    if not asks_reward(rollout, algorithm):
        for key in sorted(typed):
            if key == "reward" or key.startswith("reward."):
                why = "recorded responses have their own labels" if rollout.source == "data" else "no reward is read"
                yield ConfigIssue(key, f"has no effect: {why}; with rollout.judge=always it scores the responses")
    if rollout.source == "data":
        for key in sorted(typed & {f"algorithm.{name}" for name in SAMPLED}):
            yield ConfigIssue(key, "has no effect with rollout.source=data: the data say how many responses there are")
    if has_engines(rollout, evaluation) and rollout.source != "model":
        return
    remedy = " (unless evaluation.generate=true)" if rollout.source == "data" else ""
    for key in sorted(typed):
        of_engines = rollout.source == "data" and key.startswith("rollout.")
        if key.startswith(("verifier", "evaluation.")) or (of_engines and _option(key) not in ON_RECORDED):
            yield ConfigIssue(
                key, f"has no effect: the policy samples nothing with rollout.source={rollout.source}{remedy}"
            )


def _option(key: str) -> str:
    """Return the option of a key, which may be nested inside it."""
    return ".".join(key.split(".")[:2])


def filters_see_scores(algorithm: Algorithm, rollout: RolloutConfig, buffer: BufferConfig) -> Issues:
    if rollout.source == "data" or asks_reward(rollout, algorithm):
        return
    for name in ("drop_equal_rewards", "min_group_reward", "max_group_reward"):
        if (value := getattr(buffer, name)) is not None and value is not False:  # 0.0 is a bound
            yield ConfigIssue(f"buffer.{name}", "has no effect: no reward is used (rollout.judge=always uses one)")


def references_have_a_use(algorithm: Algorithm, rollout: RolloutConfig, learner: LearnerConfig) -> Issues:
    if learner.reference_cache is not None and not references_are_cached(rollout, algorithm):
        yield ConfigIssue(
            "learner.reference_cache",
            "has no effect: only a reference policy that does not change is cached, and only on recorded responses "
            "(rollout.source=data)",
        )


def epochs_or_steps(trainer: TrainerConfig, typed: AbstractSet[str]) -> Issues:
    if trainer.total_epochs is not None and "trainer.total_steps" in typed:
        yield ConfigIssue("trainer.total_steps", "and trainer.total_epochs exclude each other: set one")


def nothing_waits_for_engines(rollout: RolloutConfig, trainer: TrainerConfig, typed: AbstractSet[str]) -> Issues:
    """Check keys of other sections that concern a sampler running alongside the learner."""
    if rollout.source != "data":
        return
    if trainer.max_staleness:
        yield ConfigIssue("trainer.max_staleness", "has no effect with rollout.source=data: nothing is sampled; set 0")
    for key in sorted(typed & {"trainer.mismatch_alarm", "trainer.max_mismatch"}):
        yield ConfigIssue(key, "has no effect with rollout.source=data: no engine samples the training data")


SOURCES = (
    algorithm_learns_from_the_source,
    data_have_responses,
    prompts_have_something_to_compare,
    labels_are_of_both_kinds,
    rows_are_noted,
    labels_are_labels,
    reward_gets_the_policy,
    batches_are_large_enough,
    frozen_models_exist,
    source_options_act,
    filters_see_scores,
    references_have_a_use,
    epochs_or_steps,
    nothing_waits_for_engines,
)
