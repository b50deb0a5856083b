"""Checks of the options for long sequences: ranks that share them, and activations offloaded to host memory."""

from __future__ import annotations

from collections.abc import Iterator

from algorithms.base import POLICY, REFERENCE, Algorithm
from rlkit.config.messages import ConfigIssue, Issues
from rlkit.config.schema import ClusterConfig, CriticConfig, LearnerConfig, ModelConfig
from rlkit.models.folder import ModelFolderError, check_model_folder, model_folder
from rlkit.models.usable import known_run

MOST_RANKS = 64
"""Largest number of ranks tried when listing those that can share a model's heads."""


def sequences_can_be_shared(
    learner: LearnerConfig, critic: CriticConfig, algorithm: Algorithm, model: ModelConfig
) -> Issues:
    for name, section, paths in _models(learner, critic, algorithm, model):
        key, together = f"{name}.sequence_parallel", section.sequence_parallel
        if together == 1:
            continue
        if section.ranks % together:
            yield ConfigIssue(
                key, f"{name}.ranks={section.ranks} cannot be divided into groups of {together} that share sequences"
            )
            continue
        for path in paths:
            yield from _shareable(key, path, together)


def _models(
    learner: LearnerConfig, critic: CriticConfig, algorithm: Algorithm, model: ModelConfig
) -> Iterator[tuple[str, LearnerConfig, list[str]]]:
    """Yield the sections in use, with the folders of the models that their ranks run."""
    needs = algorithm.needs()
    frozen = {one.model for one in needs.passes.values()} - {POLICY, REFERENCE}
    yield "learner", learner, [model.path, *sorted(frozen)]
    if needs.critic:
        yield "critic", critic, [critic.path or model.path]


def _shareable(key: str, path: str, together: int) -> Issues:
    try:
        shape, folder = check_model_folder(path), model_folder(path)
    except (ModelFolderError, ValueError):
        return  # reported with the model
    if known_run(folder) == "rows":
        yield ConfigIssue(
            key,
            f"{path} runs row by row (docs/models.md), because its tokens interact outside attention, and ranks can "
            "share sequences only in attention; leave it at 1",
        )
    elif not shape.shares_heads(together):
        fit = [str(n) for n in range(2, MOST_RANKS + 1) if shape.shares_heads(n)]
        yield ConfigIssue(
            key,
            f"{together} ranks cannot share the {shape.heads} attention heads and {shape.kv_heads} key-value heads of "
            f"{path} equally; {', '.join(fit) or 'only 1'} can",
        )


def activations_can_be_offloaded(
    learner: LearnerConfig, critic: CriticConfig, algorithm: Algorithm, model: ModelConfig, cluster: ClusterConfig
) -> Issues:
    for name, section, _ in _models(learner, critic, algorithm, model):
        key = f"{name}.offload_activations"
        if section.offload_activations and cluster.device == "cpu":
            yield ConfigIssue(
                key, "moves activations to host memory, where they already are with cluster.device=cpu; leave it out"
            )
        elif section.offload_activations and not section.gradient_checkpointing:
            yield ConfigIssue(
                key,
                "moves the layers' inputs, all that gradient checkpointing keeps; without it all activations are kept, "
                f"far too much to move: set {name}.gradient_checkpointing=true",
            )


LONG_CONTEXTS = (sequences_can_be_shared, activations_can_be_offloaded)
