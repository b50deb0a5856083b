"""On-policy distillation: each token of the policy's own samples is pulled towards a teacher by the reverse KL
(MiniLLM, arXiv 2306.08543; GKD, arXiv 2306.13649).

The reverse KL's gradient is that of a policy whose token rewards are the teacher's log-ratios,

    r_t = log pi_T(y_t | y_<t) - log pi(y_t | y_<t),    A_t = sum over s >= t of gamma^(s - t) r_s,

exact with gamma = 1; gamma = 0 counts each token on its own, with far less noise. Loss: the surrogate of `loss`. To
distil from a file of the teacher's responses, or on the teacher's samples, use `algorithm=sft`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Self

import numpy as np
from pydantic import Field, model_validator

from algorithms.base import Advantages, AlgorithmNeeds, Experience, Pass
from algorithms.functional.advantages import token_advantages
from algorithms.functional.returns import float64, reward_to_go
from algorithms.surrogate import SurrogateAlgorithm, SurrogateConfig


class Distill(SurrogateAlgorithm):
    class Config(SurrogateConfig):
        samples_per_prompt: int = Field(default=4, ge=1)
        teacher: str
        """Folder of the teacher, which must have the policy's tokenizer. Every rank holds the model."""
        gamma: float = Field(default=0.0, ge=0, le=1)
        """Discount of the log-ratios of later tokens; 1: the exact gradient of the reverse KL."""

        @model_validator(mode="after")
        def _no_reward_is_read(self) -> Self:
            if self.by_length:
                raise ValueError(f"{self.by_length} has no effect: distillation reads no rewards")
            if self.kl_in == "reward":
                raise ValueError("kl_in=reward has no effect: distillation reads no rewards; use kl_in=loss")
            return self

    def needs(self) -> AlgorithmNeeds:
        passes = {"policy": Pass(), "teacher": Pass(self.config.teacher)}
        return replace(super().needs(), rewards=False, passes=passes)

    def credit(self, experience: Experience) -> Advantages:
        masks = [sample.trained for group in experience.groups for sample in group.samples]
        policy, teacher = (float64(experience.logprobs[name]) for name in ("policy", "teacher"))
        ratios = [np.where(mask, theirs - ours, 0.0) for mask, theirs, ours in zip(masks, teacher, policy, strict=True)]
        keep = np.array([bool(mask.any()) for mask in masks], dtype=np.bool_)
        tokens = reward_to_go(ratios, masks, self.config.gamma)
        trained = np.concatenate([row[mask] for row, mask in zip(ratios, masks, strict=True)])
        metrics = {"distill/reverse_kl": -float(trained.mean())} if len(trained) else {}
        return token_advantages(tokens, keep, masks, metrics)
