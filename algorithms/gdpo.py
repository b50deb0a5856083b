"""GDPO: group reward-decoupled normalisation (arXiv 2601.05242), for rewards with several components.

Each component is made relative to its group and divided by its std in the group before the components are summed: a
rare one counts as much as a frequent one, and different combinations with the same sum are distinguished. The sum is
divided by its std over the step. Loss: GRPO's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Self

import numpy as np
from pydantic import Field, model_validator

from algorithms.base import Advantages, AlgorithmNeeds, Experience
from algorithms.functional.advantages import Float64, Outcomes, spread, token_advantages
from algorithms.functional.estimators import decoupled
from algorithms.functional.losses import Aggregation
from algorithms.surrogate import SurrogateAlgorithm, SurrogateConfig
from rlkit.experience import UserError


class GDPO(SurrogateAlgorithm):
    class Config(SurrogateConfig):
        components: dict[str, float] = Field(min_length=1)
        """Weights of the reward's components by name (`reward/component/NAME` among the metrics; the parts of a
        combined reward have their own names). The reward's value is not used."""
        aggregation: Aggregation = "sequence_mean_token_mean"

        @model_validator(mode="after")
        def _only_components_count(self) -> Self:
            idle = "kl_in=reward" if self.kl_in == "reward" else self.by_length
            if idle:
                raise ValueError(f"{idle} has no effect on GDPO, which reads the reward's components")
            return self

    def needs(self) -> AlgorithmNeeds:
        return replace(super().needs(), min_samples_per_prompt=2)

    def normalises(self) -> bool:
        return True

    def credit(self, experience: Experience) -> Advantages:
        outcomes = Outcomes.of(experience)
        names, weights = list(self.config.components), np.array(list(self.config.components.values()))
        components = _components(experience, outcomes, names)
        relative, keep = decoupled(components, weights, outcomes.valid, outcomes.group)
        return token_advantages(spread(relative, outcomes.masks), keep, outcomes.masks, {})


def _components(experience: Experience, outcomes: Outcomes, names: Sequence[str]) -> Float64:
    """[B, K], 0 where invalid. Raise UserError if a valid sample lacks a component."""
    rows = []
    scores = [(group, score) for group in experience.groups for _, score in group.scored()]
    for (group, score), valid in zip(scores, outcomes.valid, strict=True):
        missing = [name for name in names if name not in score.components] if valid else []
        if missing:
            raise UserError(
                f"algorithm.components: the reward of a response to prompt {group.prompt.id} has no component "
                f"{missing[0]}; it has {', '.join(score.components) or 'none'}"
            )
        rows.append([score.components.get(name, 0.0) for name in names])
    return np.array(rows, dtype=np.float64)
