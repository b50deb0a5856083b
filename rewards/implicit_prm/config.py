"""The options of `reward=implicit_prm`; does not import torch."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from rewards.base import UpdateWhen
from rewards.parts import OutcomeConfig
from rlkit.config.lora import AdapterConfig
from rlkit.experience.section import LearningRate

Objective = Literal["ce", "dpo", "nca", "kto"]
PAIRED: tuple[Objective, ...] = ("dpo", "nca")
"""Objectives on pairs of a better and a worse response to one prompt."""


class ImplicitPRMConfig(OutcomeConfig):
    """Defaults are PRIME's (script and paper), except for the scale of the learning rate."""

    model_path: str = "embedded:policy"
    """Folder of the causal language model that pi_phi starts from, usually that of the policy."""
    reference_path: str | None = None
    """Folder of the frozen pi_ref; null: the same as `model_path`."""
    outcome: dict[str, Any] | None = Field(default={"_target_": "rewards.verifiers.math.MathReward"})
    """The reward that labels outcomes: `_target_` and its fields; its values should be from 0 to 1. null: none; the
    value is then the model's own score, beta * its summed log-ratios (needs update=none)."""
    reference: Literal["frozen", "policy"] = "frozen"
    """frozen: pi_ref never changes; policy: pi_ref is the current policy (its log-probs are computed here, at
    temperature 1, which costs one transfer of the weights per step)."""
    beta: float = Field(default=0.05, gt=0)
    """Scale of the log-ratios, in the rewards and in the objective."""
    objective: Objective = "ce"
    """ce: each response against its label, which may be soft; dpo, nca: pairs within a group; kto: unpaired."""
    update: UpdateWhen = "after"
    """after: score the whole step, then learn from it; before: learn from it, then score."""
    learning_rate: LearningRate = 1e-6
    """Constant learning rate of AdamW."""
    minibatch_groups: int = Field(default=64, ge=1)
    """Groups per optimizer step, in order."""
    max_grad_norm: float = Field(default=10.0, gt=0)
    """Gradients are clipped to this norm."""
    tokens_per_microbatch: int = Field(default=16384, ge=1)
    """Tokens per forward and backward pass."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third slower."""
    heldout_groups: int = Field(default=16, ge=0)
    """Number of groups, from the first steps, that the model never learns from, to measure its accuracy (at most a
    quarter of a step's groups)."""
    offload: bool = False
    """CUDA only: keep both models and the optimizer in CPU memory while nothing is scored or learnt."""

    lora: AdapterConfig | None = None
    """Train a low-rank adapter: reward.lora.rank=16. pi_ref is then pi_phi without the adapter, so no second model is
    loaded. null: all weights are trained."""

    @model_validator(mode="after")
    def _options_fit(self) -> Self:
        if self.outcome is None and self.update != "none":
            raise ValueError("outcome=null leaves nothing to learn from; set update=none as well")
        if self.reference == "policy" and self.reference_path is not None:
            raise ValueError("reference_path has no effect with reference=policy")
        if self.lora is not None and (self.reference == "policy" or self.reference_path is not None):
            raise ValueError(
                "with lora the reference is the model without its adapter: leave reference and reference_path"
            )
        return self
