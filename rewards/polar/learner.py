"""Trains the discriminator and measures it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rewards.polar.backends import RELEASED_ARCHITECTURE
from rewards.polar.serialise import MARKER, SEPARATOR, Limits, Serialiser, Wrapper
from rewards.polar.triplets import PromptRows, Triplet, attainable_accuracy, contrasts, verdicts
from rewards.verifiers.answers import final_answer
from rlkit.config.schema import LearnerConfig
from rlkit.data.rendering import load_tokenizer
from rlkit.models.forward import ModelLoadError, PackedScorer
from rlkit.models.packing import Tree, pack, shared_prefix, split_by_tokens
from rlkit.models.policy import load_scorer, load_value_model
from rlkit.reward_training.engine import PromptTree, SupervisedEngine, pair_indices, save_classifier

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class PairMeasures:
    loss: float
    accuracy: float
    """Share of pairs in which chosen scores strictly above rejected."""


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

    def comparisons(self, triplets: Sequence[Triplet]) -> list[PromptTree]:
        """Group triplets by prompt and reference; each distinct candidate is encoded once."""
        together: dict[tuple[str, str], list[Triplet]] = {}
        for triplet in triplets:
            together.setdefault((triplet.prompt, triplet.reference), []).append(triplet)
        comparisons = []
        for (prompt, reference), members in together.items():
            texts = dict.fromkeys(text for triplet in members for text in (triplet.chosen, triplet.rejected))
            index = {text: i for i, text in enumerate(texts)}
            encoded = [
                tuple(self._serialiser.token_ids(self._serialiser.text(prompt, reference, text, list(texts))))
                for text in texts
            ]
            prefix = shared_prefix(encoded)[: min(map(len, encoded)) - 1]  # each suffix keeps at least one token
            tree = Tree(prefix, tuple(ids[len(prefix) :] for ids in encoded))
            comparisons.append(PromptTree(tree, tuple((index[t.chosen], index[t.rejected]) for t in members)))
        return comparisons

    def _scores(self, module: Any, comparisons: Sequence[PromptTree]) -> Tensor:
        scores: Tensor = module(pack([comparison.tree for comparison in comparisons]).to(self.training.device))
        return scores

    def _margins(self, module: Any, comparisons: Sequence[PromptTree]) -> Tensor:
        scores = self._scores(module, comparisons)
        chosen, rejected = pair_indices(comparisons)
        margins: Tensor = scores[chosen] - scores[rejected]
        return margins

    def _loss(self, module: Any, comparisons: Sequence[PromptTree]) -> Tensor:
        total: Tensor = -logsigmoid(self._margins(module, comparisons)).sum()
        return total

    def step(self, triplets: Sequence[Triplet]) -> float:
        """Train on a batch; return the mean pair loss before the step (ln 2 at first, with a zero head)."""
        return self.training.step(self.comparisons(triplets), len(triplets))

    @torch.no_grad()
    def measure(self, triplets: Sequence[Triplet]) -> PairMeasures:
        margins = torch.cat(
            [self._margins(self.training.engine, batch) for batch, _ in self._batches(self.comparisons(triplets))]
        )
        return PairMeasures(float(-logsigmoid(margins).mean()), float((margins > 0).float().mean()))

    @torch.no_grad()
    def scores(self, inputs: Sequence[tuple[str, str, str]]) -> list[float]:
        comparisons = []
        for texts in inputs:
            ids = tuple(self._serialiser.token_ids(self._serialiser.text(*texts)))
            comparisons.append(PromptTree(Tree(ids[:-1], (ids[-1:],))))
        scores = [0.0] * len(comparisons)
        for batch, indices in self._batches(comparisons):
            for index, score in zip(indices, self._scores(self.training.engine, batch).tolist(), strict=True):
                scores[index] = score
        return scores

    def _batches(self, comparisons: Sequence[PromptTree]) -> Iterator[tuple[list[PromptTree], list[int]]]:
        sizes = [comparison.tokens for comparison in comparisons]
        for indices in split_by_tokens(sizes, self.training.config.tokens_per_microbatch):
            yield [comparisons[index] for index in indices], indices

    def save(self, folder: Path) -> None:
        save_classifier(self.training, self.tokenizer, folder)


def load_start(folder: Path) -> tuple[PreTrainedTokenizerBase, PackedScorer]:
    """Load the model to train. A language model gets a head of zeros (first pair loss: ln 2) and missing marker tokens.

    The markers' embeddings are the mean of all others. Raise ModelLoadError with the remedy.
    """
    config = json.loads((folder / "config.json").read_text())
    architecture = (config.get("architectures") or ["(none)"])[0]
    if architecture == RELEASED_ARCHITECTURE:
        raise ModelLoadError(
            f"{folder} holds a {RELEASED_ARCHITECTURE}; convert it first: python -m rewards.polar.convert {folder} "
            f"{folder}-llama"
        )
    tokenizer = load_tokenizer(folder)
    if architecture.endswith("ForSequenceClassification"):
        return tokenizer, load_scorer(folder, torch.float32)
    model: Any = load_value_model(folder, torch.float32).model
    model.config.problem_type = "regression"  # makes vLLM's classify return the raw score
    model.config.tie_word_embeddings = False  # a classifier has no output embeddings
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    missing = [text for text in (SEPARATOR, MARKER) if len(tokenizer.encode(text, add_special_tokens=False)) != 1]
    if missing:
        tokenizer.add_special_tokens({"additional_special_tokens": missing}, replace_extra_special_tokens=False)
        _make_room(model, len(tokenizer), len(missing))
    return tokenizer, PackedScorer(model)


def _make_room(model: Any, tokens: int, new: int) -> None:
    """Set the last `new` of `tokens` embeddings to the mean of the others."""
    embeddings = model.get_input_embeddings().weight
    if embeddings.shape[0] < tokens:
        model.resize_token_embeddings(tokens, mean_resizing=False)
        embeddings = model.get_input_embeddings().weight
    with torch.no_grad():
        embeddings[tokens - new : tokens] = embeddings[: tokens - new].mean(0)


# -- measures ----------------------------------------------------------------------------------------------------------


def final(text: str) -> str:
    """Return the marked final answer, or the whole response."""
    answer = final_answer(text)
    return text.strip() if answer is None else answer.text


def measure(
    learner: PolarLearner, prompts: Sequence[PromptRows], policies: Sequence[str], across_styles: bool = False
) -> dict[str, float]:
    measures: dict[str, float] = {}
    by_policy = [triplet for group in contrasts(prompts, policies, across_styles) for triplet in group]
    if by_policy:
        measured = learner.measure(by_policy)
        measures["same_versus_different_loss"] = measured.loss
        measures["same_versus_different_accuracy"] = measured.accuracy
        measures["same_versus_different_attainable"] = attainable_accuracy(by_policy, final)
        measures["same_versus_different_triplets"] = len(by_policy)
    by_label = [triplet for group in verdicts(prompts) for triplet in group]
    if by_label:
        measured = learner.measure(by_label)
        measures["right_versus_wrong_loss"] = measured.loss
        measures["right_versus_wrong_accuracy"] = measured.accuracy
        measures["right_versus_wrong_triplets"] = len(by_label)
    labelled = [
        (prompt, trajectory)
        for prompt in prompts
        for trajectory in prompt.trajectories
        if prompt.reference is not None and trajectory.correct is not None
    ]
    if len({trajectory.correct for _, trajectory in labelled}) == 2:
        scores = learner.scores([(prompt.prompt, prompt.reference or "", t.text) for prompt, t in labelled])
        right = [float(bool(trajectory.correct)) for _, trajectory in labelled]
        measures["pearson"] = correlation(scores, right)
        measures["spearman"] = correlation(ranks(scores), ranks(right))
        measures["labelled_responses"] = len(labelled)
    return measures


def correlation(left: Sequence[float], right: Sequence[float]) -> float:
    """Return Pearson's correlation; 0 if one side does not vary."""
    x, y = (np.asarray(values, dtype=np.float64) - np.mean(values) for values in (left, right))
    size = float(np.sqrt((x * x).sum() * (y * y).sum()))
    return float((x * y).sum() / size) if size > 0 else 0.0


def ranks(values: Sequence[float]) -> list[float]:
    """Return ranks from 0; equal values share their mean rank."""
    _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    middle: list[float] = ((ends - 1 + ends - counts) / 2)[inverse].tolist()
    return middle
