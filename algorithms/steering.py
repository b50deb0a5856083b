"""Weights of loss terms that adapt to what the last update measured: of the KL penalty and of the entropy bonus."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from algorithms.functional.entropy import AdaptiveEntropy
from algorithms.functional.kl import AdaptiveCoefficient
from algorithms.surrogate_config import SurrogateConfig


@dataclass(frozen=True)
class Steered:
    """Adaptive weights of one algorithm. Immutable."""

    config: SurrogateConfig
    adaptive_kl: AdaptiveCoefficient | None = None
    entropy: AdaptiveEntropy | None = None

    @classmethod
    def of(cls, config: SurrogateConfig) -> Steered:
        c, kl, entropy = config, None, None
        if c.kl_target is not None:
            kl = AdaptiveCoefficient(c.kl_coefficient, c.kl_target, c.kl_horizon)
        if c.entropy_target is not None:
            entropy = AdaptiveEntropy(c.entropy_coefficient, c.entropy_target, c.entropy_step, c.entropy_limit)
        return cls(config, kl, entropy)

    @property
    def kl(self) -> float:
        return self.config.kl_coefficient if self.adaptive_kl is None else self.adaptive_kl.value

    @property
    def bonus(self) -> bool:
        """Whether the loss may have an entropy bonus."""
        return self.entropy is not None or self.config.entropy_coefficient > 0

    def weights(self) -> dict[str, float]:
        """Weights that the loss reads from `Advantages.scalars`; a fixed weight of the bonus comes from the
        configuration."""
        kl = {"kl_coefficient": self.kl} if self.config.kl_coefficient else {}
        return kl if self.entropy is None else {**kl, "entropy_coefficient": self.entropy.weight}

    def metrics(self) -> dict[str, float]:
        names = {"kl_coefficient": "kl/coefficient", "entropy_coefficient": "policy/entropy_coefficient"}
        return {names[name]: weight for name, weight in self.weights().items()}

    def after(self, metrics: Mapping[str, float]) -> Steered:
        """Return the weights after an update that reported `metrics`."""
        kl, entropy = self.adaptive_kl, self.entropy
        if kl is not None and "kl/reference" in metrics:
            kl = kl.adjust(metrics["kl/reference"], int(metrics["policy/trained_samples"]))
        if entropy is not None and "policy/entropy" in metrics:
            entropy = entropy.adjust(metrics["policy/entropy"])
        return replace(self, adaptive_kl=kl, entropy=entropy)

    def state_dict(self) -> dict[str, Any]:
        kl = {} if self.adaptive_kl is None else {"kl_coefficient": self.adaptive_kl.value}
        if self.entropy is None:
            return kl
        return {**kl, "entropy_coefficient": self.entropy.value, "entropy_below": self.entropy.below}

    def restored(self, state: Mapping[str, Any]) -> Steered:
        kl, entropy = self.adaptive_kl, self.entropy
        if kl is not None:
            kl = replace(kl, value=state["kl_coefficient"])
        if entropy is not None:
            entropy = replace(entropy, value=state["entropy_coefficient"], below=state["entropy_below"])
        return replace(self, adaptive_kl=kl, entropy=entropy)
