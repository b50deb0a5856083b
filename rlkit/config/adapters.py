"""Checks of `model.lora`."""

from __future__ import annotations

from algorithms.base import Algorithm
from rlkit.config.lora import ALL_LINEAR, adapted_layers, is_target
from rlkit.config.messages import ConfigIssue, Issues
from rlkit.config.parts import Part
from rlkit.config.plan import has_engines, published_adapter
from rlkit.config.schema import ClusterConfig, EvaluationConfig, ModelConfig, RolloutConfig
from rlkit.experience.extras import lacking
from rlkit.models.folder import ModelFolderError, ModelShape, linear_shapes, model_folder

KEY = "model.lora"


def peft_is_installed(model: ModelConfig) -> Issues:
    for message in lacking("peft", "lora") if model.lora is not None else []:
        yield ConfigIssue(f"{KEY}.rank", message)


def layers_exist(model: ModelConfig, model_shape: ModelShape | ModelFolderError) -> Issues:
    lora = model.lora
    if lora is None or isinstance(model_shape, ModelFolderError):
        return
    known = linear_shapes(model_folder(model.path))
    if lora.target_modules == ALL_LINEAR:
        if not known:
            yield ConfigIssue(f"{KEY}.target_modules", "name the layers: the model's weights are not safetensors files")
        return
    absent = [target for target in lora.target_modules if not any(is_target(name, (target,)) for name in known)]
    if known and (absent or not adapted_layers(model.path, lora)):
        names = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in known))
        why = f"the model has no linear layer {', '.join(absent)}; it" if absent else "the list is empty; the model"
        yield ConfigIssue(f"{KEY}.target_modules", f"{why} has {names}")


def reference_is_the_base(model: ModelConfig, algorithm: Algorithm) -> Issues:
    if model.lora is not None and algorithm.config.reference_every_steps:
        yield ConfigIssue(
            "algorithm.reference_every_steps",
            f"with {KEY} the reference is the model without its adapter, which never changes: use 0, or train all "
            "weights",
        )


def publishing_acts(model: ModelConfig, rollout: RolloutConfig, evaluation: EvaluationConfig) -> Issues:
    if model.lora is None or model.lora.publish == "auto":
        return
    if rollout.source == "model" or not has_engines(rollout, evaluation):
        yield ConfigIssue(f"{KEY}.publish", "has no effect: nothing is sampled from the policy")


def reward_gets_whole_weights(
    cluster: ClusterConfig, model: ModelConfig, rollout: RolloutConfig, reward: Part
) -> Issues:
    if published_adapter(cluster, rollout, model) is not None and reward.cls.traits(reward.config).follows_policy:
        yield ConfigIssue(
            f"{KEY}.publish",
            f"{reward.cls.__name__} takes the policy's whole weights after each step; use {KEY}.publish=merged",
        )


ADAPTERS = (
    peft_is_installed,
    layers_exist,
    reference_is_the_base,
    publishing_acts,
    reward_gets_whole_weights,
)
