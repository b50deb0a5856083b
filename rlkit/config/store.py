"""Predicted contents of Ray's object store, and what goes through it. Without torch."""

from __future__ import annotations

from dataclasses import replace

from rlkit.config.environments import longest_sample
from rlkit.config.lora import adapter_parameters
from rlkit.config.parts import ResolvedRun
from rlkit.config.plan import element_bytes, published_adapter, weight_route
from rlkit.config.schema import RunConfig
from rlkit.models.folder import ModelShape, check_model_folder


def step_bytes(run: ResolvedRun) -> float:
    """Return the bytes of a step's groups: ids, log-probs and text of all responses at full length, and of prompts."""
    config = run.config
    tokens = config.rollout.max_prompt_tokens + run.algorithm_config.samples_per_prompt * longest_sample(run)
    return float(16 * config.trainer.prompts_per_step * config.rollout.oversample * tokens)


def stored_bytes(run: ResolvedRun) -> float:
    """Return the most bytes that the object store holds: two versions of the weights, if they go through it; the groups
    of the steps being sampled, scored or trained; and the data of these that ranks get and return."""
    width = element_bytes(run.config.learner.dtype, run.config.cluster.device == "cuda")
    return 2 * width * bundle_elements(run.config) + (3 + run.config.trainer.max_staleness) * step_bytes(run)


def policy_shape(config: RunConfig) -> ModelShape:
    lora, shape = config.model.lora, check_model_folder(config.model.path)
    return shape if lora is None else replace(shape, adapter=adapter_parameters(config.model.path, lora))


def bundle_elements(config: RunConfig) -> float:
    """Return the number of weights that go to engines, or to a reward, through the object store at each step."""
    if not config.rollout.workers or config.rollout.source == "model":
        return 0.0
    if weight_route(config.cluster, config.rollout, config.learner, config.model) != "object_store":
        return 0.0
    shape = policy_shape(config)
    return shape.whole if published_adapter(config.cluster, config.rollout, config.model) is None else shape.trained


def object_store_bytes(run: ResolvedRun) -> float:
    """Return the size of the object store: `cluster.object_store_gib`, or enough for what it holds."""
    asked = run.config.cluster.object_store_gib
    return max(2.0**29, 1.2 * stored_bytes(run)) if asked is None else asked * 2**30
