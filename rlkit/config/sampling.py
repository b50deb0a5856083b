"""Checks of how responses are sampled, and of how that affects their log-probs."""

from __future__ import annotations

import math

from rlkit.config.messages import ConfigIssue, Issues
from rlkit.config.schema import ClusterConfig, LearnerConfig, RolloutConfig, TrainerConfig
from rlkit.config.structured import grammar
from rlkit.data.base import DataSource
from rlkit.experience.filters import BufferConfig
from rlkit.models.folder import ModelFolderError, ModelShape


def sampler_and_learner_agree(
    cluster: ClusterConfig, rollout: RolloutConfig, learner: LearnerConfig, trainer: TrainerConfig
) -> Issues:
    why = "the sampler's log-probs then differ from the learner's; watch mismatch/logprob_mean"
    for name in rollout.reshaping:
        how = "penalised logits" if name == "repetition_penalty" else "a truncated distribution"
        ends = _ends_by_mismatch(name, rollout, trainer)
        yield ConfigIssue(f"rollout.{name}", f"samples from {how}: {why}{ends}", warning=True)
    usual = "float32" if cluster.device == "cpu" else "bfloat16"
    sampler, trained = (usual if dtype == "auto" else dtype for dtype in (rollout.dtype, learner.dtype))
    if sampler != trained:
        yield ConfigIssue("rollout.dtype", f"is {sampler}, the learner's is {trained}: {why}", warning=True)


def _ends_by_mismatch(name: str, rollout: RolloutConfig, trainer: TrainerConfig) -> str:
    """Nucleus sampling changes no log-prob by more than -ln(top_p); for the other options there is no bound."""
    limit = trainer.max_mismatch
    if limit is None or trainer.max_staleness or (name == "top_p" and -math.log(rollout.top_p) <= limit):
        return ""
    return (
        f". A mean difference above trainer.max_mismatch={limit:g} in three steps in a row ends the run, which may "
        "happen here: trainer.max_mismatch=null turns that off"
    )


def surplus_has_a_use(rollout: RolloutConfig, buffer: BufferConfig, trainer: TrainerConfig) -> Issues:
    if rollout.oversample == 1:
        return
    if not buffer.drops_groups:
        yield ConfigIssue(
            "rollout.oversample",
            "has no effect: no filter rejects groups (buffer.drop_equal_rewards and the like), so no step lacks any",
        )
    elif trainer.max_staleness:
        yield ConfigIssue(
            "rollout.oversample",
            f"is for trainer.max_staleness=0; with {trainer.max_staleness} a rejected group is replaced while others "
            "are sampled and trained, so no step waits for another round",
        )


def stop_tokens_exist(model_shape: ModelShape | ModelFolderError, rollout: RolloutConfig) -> Issues:
    if isinstance(model_shape, ModelFolderError):
        return
    for stop in rollout.stop_ids:
        if not 0 <= stop < model_shape.vocabulary:
            yield ConfigIssue(
                "rollout.stop", f"token {stop} is not in the model's vocabulary of {model_shape.vocabulary}"
            )


def structure_is_usable(rollout: RolloutConfig, data: DataSource) -> Issues:
    config = rollout.structured
    if config is None:
        return
    key = f"rollout.structured.{config.kind}"
    if config.column is None:
        try:
            grammar(config, {})
        except ValueError as error:
            yield ConfigIssue(key, str(error))
        return
    columns = data.provides() - {"answer", "references"}
    if config.column not in columns:
        yield ConfigIssue(
            key,
            f"{getattr(data.config, 'path', type(data).__name__)} has no column {config.column!r} besides those that "
            f"other keys name; it has {', '.join(sorted(columns)) or 'none'}",
        )


SAMPLING = (sampler_and_learner_agree, surplus_has_a_use, stop_tokens_exist, structure_is_usable)
