"""Fine-tunes a language model on prompts and targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlkit.config.schema import LearnerConfig
from rlkit.learner.engine import load_to_train
from rlkit.models.packing import Tree, pack
from rlkit.models.policy import load_causal_lm
from rlkit.reward_training.engine import SupervisedEngine, save_language_model


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids of prompt and target; the loss covers only the target."""

    prompt: tuple[int, ...]
    target: tuple[int, ...]
    trained: tuple[bool, ...] | None = None
    """Which tokens of the target the loss covers; None: all."""

    @property
    def tree(self) -> Tree:
        return Tree(self.prompt, (self.target,))

    @property
    def tokens(self) -> int:
        """Number of tokens that count towards a micro-batch's limit."""
        return self.tree.charged_tokens

    @property
    def weights(self) -> tuple[bool, ...]:
        return self.trained or (True,) * len(self.target)


class SupervisedLearner:
    """Trains by supervised learning; needs an initialised process group."""

    def __init__(
        self,
        model_path: str | Path,
        config: LearnerConfig,
        *,
        device: str,
        total_steps: int,
        trust_remote_code: bool = False,
    ) -> None:
        policy = load_to_train(load_causal_lm, model_path, config, device, trust_remote_code=trust_remote_code)
        self._chunk = config.logit_elements_per_chunk
        self.training = SupervisedEngine(policy, self._loss, config, device=device, total_steps=total_steps)

    def _loss(self, module: Any, examples: Sequence[Example]) -> Tensor:
        batch = pack([example.tree for example in examples]).to(self.training.device)
        logprobs, _ = module(batch, 1.0, self._chunk)
        weights = [weight for example in examples for weight in example.weights]
        total: Tensor = -(logprobs * torch.tensor(weights, device=logprobs.device)).sum()
        return total

    def step(self, examples: Sequence[Example]) -> float:
        """Train on a batch; return the loss per trained token before the step."""
        return self.training.step(examples, trained_tokens(examples))

    def evaluate(self, examples: Sequence[Example]) -> float:
        """Return the loss per trained token."""
        return self.training.evaluate(examples, trained_tokens(examples))

    def save(self, folder: Path) -> None:
        save_language_model(self.training, folder)


def trained_tokens(examples: Sequence[Example]) -> float:
    return float(sum(sum(example.weights) for example in examples))
