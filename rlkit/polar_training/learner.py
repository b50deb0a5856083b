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

from rewards.polar.plan import shared_prefix
from rewards.polar.serialise import Limits, Serialiser, Wrapper
from rlkit.config.schema import LearnerConfig
from rlkit.data.prompts import load_tokenizer
from rlkit.models.packing import Tree, pack
from rlkit.models.policy import load_scorer
from rlkit.polar_training.triplets import Triplet
from rlkit.supervised import SupervisedEngine, gathered_weights


@dataclass(frozen=True, slots=True)
class PairMeasures:
    """How a discriminator orders pairs."""

    loss: float
    accuracy: float
    """Share of pairs with chosen strictly above rejected: a tie counts as wrong."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Candidates beside one reference, and which of them should score higher than which."""

    tree: Tree
    pairs: tuple[tuple[int, int], ...]
    """(place of the better, place of the worse) among the tree's suffixes."""

    @property
    def tokens(self) -> int:
        return self.tree.tokens


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

    def comparisons(self, triplets: Sequence[Triplet]) -> list[Comparison]:
        """Triplets with one prompt and one reference put together; each different candidate is encoded once."""
        together: dict[tuple[str, str], list[Triplet]] = {}
        for triplet in triplets:
            together.setdefault((triplet.prompt, triplet.reference), []).append(triplet)
        found = []
        for (prompt, reference), members in together.items():
            texts = dict.fromkeys(text for triplet in members for text in (triplet.chosen, triplet.rejected))
            place = {text: i for i, text in enumerate(texts)}
            encoded = [
                tuple(self._serialiser.token_ids(self._serialiser.text(prompt, reference, text))) for text in texts
            ]
            prefix = shared_prefix(encoded)[: min(map(len, encoded)) - 1]  # each keeps a last token of its own
            tree = Tree(prefix, tuple(ids[len(prefix) :] for ids in encoded))
            found.append(Comparison(tree, tuple((place[t.chosen], place[t.rejected]) for t in members)))
        return found

    def _margins(self, module: Any, comparisons: Sequence[Comparison]) -> Tensor:
        """[pairs] score of chosen minus score of rejected."""
        scores = module(pack([comparison.tree for comparison in comparisons]).to(self.training.device))
        start, chosen, rejected = 0, [], []
        for comparison in comparisons:
            chosen += [start + better for better, _ in comparison.pairs]
            rejected += [start + worse for _, worse in comparison.pairs]
            start += len(comparison.tree.suffixes)
        margins: Tensor = scores[chosen] - scores[rejected]
        return margins

    def _loss(self, module: Any, comparisons: Sequence[Comparison]) -> Tensor:
        """Sum over pairs of -log sigmoid(chosen - rejected)."""
        total: Tensor = -logsigmoid(self._margins(module, comparisons)).sum()
        return total

    def step(self, triplets: Sequence[Triplet]) -> float:
        """One optimizer step; returns the mean pair loss before it (ln 2 at the first, with a zero head)."""
        return self.training.step(self.comparisons(triplets), len(triplets))

    @torch.no_grad()
    def measure(self, triplets: Sequence[Triplet], per_batch: int = 64) -> PairMeasures:
        """Loss and accuracy on triplets."""
        self.training.engine.eval()
        comparisons = self.comparisons(triplets)
        margins = torch.cat(
            [
                self._margins(self.training.engine, comparisons[start : start + per_batch])
                for start in range(0, len(comparisons), per_batch)
            ]
        )
        return PairMeasures(float(-logsigmoid(margins).mean()), float((margins > 0).float().mean()))

    def save(self, folder: Path) -> None:
        """Write a plain Hugging Face folder with the tokenizer; all ranks call it, rank 0 writes."""
        model = self.training.engine.module.model
        weights = gathered_weights(model, self.training.config.zero_stage)
        if dist.get_rank() == 0:
            model.save_pretrained(folder, state_dict=weights)
            self.tokenizer.save_pretrained(folder)
