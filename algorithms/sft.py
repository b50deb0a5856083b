"""Supervised fine-tuning: the likelihood of recorded responses, or of a frozen model's (`rollout.source=data|model`).

    L = - sum over samples i of w_i sum over trained tokens t of log pi(y_it) / N

N: trained tokens of the optimizer step (token_mean), or its samples times their own tokens (sequence_mean_token_mean).
w_i: the data's weight. On a frozen model's samples this is sequence-level distillation (arXiv 1606.07947 section 3.2).
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from algorithms.base import Advantages, Algorithm, AlgorithmConfig, AlgorithmNeeds, Experience, LossInputs, LossOutput
from algorithms.functional.losses import Aggregation, aggregate


class SFT(Algorithm):
    class Config(AlgorithmConfig):
        samples_per_prompt: int = Field(default=1, ge=1)
        """Responses sampled for each prompt with rollout.source=model."""
        aggregation: Aggregation = "token_mean"
        """How token losses become one number."""

    def needs(self) -> AlgorithmNeeds:
        return AlgorithmNeeds(sources=("data", "model"), rewards=False)

    def advantages(self, experience: Experience) -> Advantages:
        scored = [(sample, score) for group in experience.groups for sample, score in group.scored()]
        return Advantages(
            tokens=[np.full(len(sample), sample.weight, np.float32) for sample, _ in scored],
            keep=np.array([score.valid for _, score in scored], dtype=np.bool_),
        )

    def loss(self, inputs: LossInputs) -> LossOutput:
        loss = aggregate(
            -inputs.advantages * inputs.logprobs,
            inputs.mask,
            inputs.sequence,
            inputs.num_sequences,
            inputs.denominators,
            self.config.aggregation,
        )
        entropy = (inputs.entropy.detach() * inputs.mask).sum() / inputs.denominators.measured
        return LossOutput(loss=loss, sums={"policy/entropy": entropy})
