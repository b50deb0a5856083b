"""The discriminator in a DeepSpeed engine, and the pair loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import logsigmoid

from rewards.polar.serialise import Limits, Serialiser, Wrapper
from rlkit.config.schema import LearnerConfig
from rlkit.data.prompts import load_tokenizer
from rlkit.models.packing import Tree, pack
from rlkit.models.policy import load_scorer
from rlkit.polar_training.triplets import Triplet
from rlkit.supervised import Microbatch, SupervisedEngine, gathered_weights


@dataclass(frozen=True, slots=True)
class PairMeasures:
    """How a discriminator orders pairs."""

    loss: float
    accuracy: float
    """Share of pairs with chosen strictly above rejected: a tie counts as wrong."""


class PolarLearner:
    """Trains a one-label classifier on triplets; needs an initialised process group.

    L = -mean log sigmoid(r(p, reference, chosen) - r(p, reference, rejected))
    """

    def __init__(
        self,
        model_path: Path,
        config: LearnerConfig,
        *,
        device: str,
        total_steps: int,
        limits: Limits,
        wrapper: Wrapper = "sft",
    ) -> None:
        self.tokenizer = load_tokenizer(model_path)
        self._serialiser = Serialiser(self.tokenizer, limits, wrapper)
        self.training = SupervisedEngine(
            load_scorer(model_path, torch.float32), self._loss, config, device=device, total_steps=total_steps
        )

    def tree(self, triplet: Triplet) -> Tree:
        """Both inputs of a triplet as token ids, what they have in common stored once."""
        chosen, rejected = (
            tuple(self._serialiser.token_ids(self._serialiser.text(triplet.prompt, triplet.reference, candidate)))
            for candidate in (triplet.chosen, triplet.rejected)
        )
        shared = 0
        for a, b in zip(chosen[:-1], rejected[:-1], strict=False):
            if a != b:
                break
            shared += 1
        return Tree(chosen[:shared], (chosen[shared:], rejected[shared:]))

    def _scores(self, module: Any, trees: Microbatch) -> Tensor:
        """[n, 2] scores of chosen and rejected."""
        scores: Tensor = module(pack(trees).to(self.training.device)).view(-1, 2)
        return scores

    def _loss(self, module: Any, trees: Microbatch) -> Tensor:
        """Sum over pairs of -log sigmoid(chosen - rejected)."""
        scores = self._scores(module, trees)
        total: Tensor = -logsigmoid(scores[:, 0] - scores[:, 1]).sum()
        return total

    def step(self, triplets: Sequence[Triplet]) -> float:
        """One optimizer step; returns the mean pair loss before it (ln 2 at the first, with a zero head)."""
        return self.training.step([self.tree(triplet) for triplet in triplets], len(triplets))

    @torch.no_grad()
    def measure(self, triplets: Sequence[Triplet], per_batch: int = 128) -> PairMeasures:
        """Loss and accuracy on triplets."""
        self.training.engine.eval()
        parts = [
            self._scores(self.training.engine, [self.tree(triplet) for triplet in triplets[start : start + per_batch]])
            for start in range(0, len(triplets), per_batch)
        ]
        margin = torch.cat([part[:, 0] - part[:, 1] for part in parts])
        return PairMeasures(float(-logsigmoid(margin).mean()), float((margin > 0).float().mean()))

    def save(self, folder: Path) -> None:
        """Write a plain Hugging Face folder with the tokenizer; all ranks call it, rank 0 writes."""
        model = self.training.engine.module.model
        weights = gathered_weights(model, self.training.config.zero_stage)
        if dist.get_rank() == 0:
            model.save_pretrained(folder, state_dict=weights)
            self.tokenizer.save_pretrained(folder)
