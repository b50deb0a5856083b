"""The discriminator in a DeepSpeed engine, and the pair loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rewards.polar.serialise import Limits, Serialiser, Wrapper
from rlkit.config.schema import LearnerConfig
from rlkit.models.packing import Tree, pack, shared_prefix, split_by_tokens
from rlkit.polar_training.start import load_start
from rlkit.polar_training.triplets import Triplet
from rlkit.reward_training.engine import SupervisedEngine, save_classifier


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
        self.tokenizer, scorer = load_start(model_path)
        if config.gradient_checkpointing:
            scorer.model.gradient_checkpointing_enable({"use_reentrant": False})
        self._serialiser = Serialiser(self.tokenizer, limits, wrapper)
        self.training = SupervisedEngine(scorer, self._loss, config, device=device, total_steps=total_steps)

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
                tuple(self._serialiser.token_ids(self._serialiser.text(prompt, reference, text, list(texts))))
                for text in texts
            ]
            prefix = shared_prefix(encoded)[: min(map(len, encoded)) - 1]  # each keeps a last token of its own
            tree = Tree(prefix, tuple(ids[len(prefix) :] for ids in encoded))
            found.append(Comparison(tree, tuple((place[t.chosen], place[t.rejected]) for t in members)))
        return found

    def _scores(self, module: Any, comparisons: Sequence[Comparison]) -> Tensor:
        """[candidates] raw scores."""
        scores: Tensor = module(pack([comparison.tree for comparison in comparisons]).to(self.training.device))
        return scores

    def _margins(self, module: Any, comparisons: Sequence[Comparison]) -> Tensor:
        """[pairs] score of chosen minus score of rejected."""
        scores = self._scores(module, comparisons)
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
    def measure(self, triplets: Sequence[Triplet]) -> PairMeasures:
        """Loss and accuracy on triplets."""
        self.training.engine.eval()
        margins = torch.cat(
            [self._margins(self.training.engine, batch) for batch, _ in self._batches(self.comparisons(triplets))]
        )
        return PairMeasures(float(-logsigmoid(margins).mean()), float((margins > 0).float().mean()))

    @torch.no_grad()
    def scores(self, inputs: Sequence[tuple[str, str, str]]) -> list[float]:
        """Raw scores of (prompt, reference, candidate)."""
        self.training.engine.eval()
        comparisons = []
        for each in inputs:
            ids = tuple(self._serialiser.token_ids(self._serialiser.text(*each)))
            comparisons.append(Comparison(Tree(ids[:-1], (ids[-1:],)), ()))
        found = [0.0] * len(comparisons)
        for batch, places in self._batches(comparisons):
            for place, score in zip(places, self._scores(self.training.engine, batch).tolist(), strict=True):
                found[place] = score
        return found

    def _batches(self, comparisons: Sequence[Comparison]) -> Iterator[tuple[list[Comparison], list[int]]]:
        """Comparisons that fit into a forward pass, and their places."""
        sizes = [comparison.tokens for comparison in comparisons]
        for places in split_by_tokens(sizes, self.training.config.tokens_per_microbatch):
            yield [comparisons[place] for place in places], places

    def save(self, folder: Path) -> None:
        """Write a plain Hugging Face folder with the tokenizer; all ranks call it, rank 0 writes."""
        save_classifier(self.training, self.tokenizer, folder)
