"""Trains the preference model and measures it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from algorithms.functional import links
from algorithms.functional.selection import expected_calibration_error
from rewards.preference.inputs import Encoded, Encoder, until_read
from rlkit.config.schema import LearnerConfig
from rlkit.models.forward import ModelLoadError, PackedScorer
from rlkit.models.packing import Tree, pack, split_by_tokens
from rlkit.models.policy import load_value_model
from rlkit.reward_training.base import RewardTrainingConfig, TrainingContext
from rlkit.reward_training.engine import PromptTree, SupervisedEngine, items_within, pair_indices, save_classifier
from rlkit.reward_training.pairs import Pair

Array = NDArray[np.float64]


def pair_losses(chosen: Tensor, rejected: Tensor, margin: Tensor, probability: Tensor, centring: float) -> Tensor:
    """Return the loss [N] per pair. With d = chosen - rejected - margin and p the probability of preferring chosen:

        -p log sigmoid(d) - (1 - p) log sigmoid(-d) + centring (chosen + rejected)^2

    p = 1 and margin = 0 give Bradley-Terry. The margin is Llama 2's (arXiv 2307.09288). The soft label is the cDPO-like
    label smoothing of Secrets of RLHF II (arXiv 2401.06080). The last term, from arXiv 2312.09244, keeps scores around
    zero.
    """
    ordering = links.sigmoid(chosen, rejected, probability=probability, margin=margin)
    return ordering + centring * (chosen + rejected).square()


def measures(chosen: Array, rejected: Array, probability: Array) -> dict[str, float]:
    """Measure how scores [N] agree with the labels.

    accuracy: share of pairs ordered as labelled, with ties counted as wrong and pairs of p = 1/2 left out; margin: mean
    of chosen - rejected; loss: cross-entropy of sigmoid(margin) against p; calibration_error: of the confidence in the
    likelier side (1/2 to 1), in ten bins.
    """
    margin = chosen - rejected
    decided = probability != 0.5
    right = np.where(margin == 0, False, (margin > 0) == (probability > 0.5))
    values = {
        "loss": float(np.mean(np.logaddexp(0, -margin) * probability + np.logaddexp(0, margin) * (1 - probability))),
        "margin": float(margin.mean()),
        "score_mean": float(np.concatenate([chosen, rejected]).mean()),
        "score_std": float(np.concatenate([chosen, rejected]).std()),
    }
    if decided.any():
        confidence = 1 / (1 + np.exp(-np.abs(margin[decided])))
        values["accuracy"] = float(right[decided].mean())
        values["calibration_error"] = expected_calibration_error(confidence, right[decided].astype(np.float64), bins=20)
    return values


@dataclass(frozen=True, slots=True)
class EncodedPair:
    pair: Pair
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PromptPairs(PromptTree):
    rows: tuple[Pair, ...] = ()
    """One per pair."""


class PreferenceLearner:
    """Trains a one-label classifier on pairs; needs an initialised process group."""

    def __init__(
        self,
        model_path: Path,
        tokenizer: Any,
        config: LearnerConfig,
        *,
        device: str,
        total_steps: int,
        centring: float,
        chat_template: str | None = None,
    ) -> None:
        model: Any = load_value_model(model_path, torch.float32).model
        if not isinstance(getattr(model, "score", None), nn.Linear):
            raise ModelLoadError(
                f"{model_path}: {type(model).__name__} cannot be trained here: sequences are packed, which takes a "
                "decoder with a linear head"
            )
        text_config = model.config.get_text_config()
        if text_config.pad_token_id is None:
            if tokenizer.pad_token_id is None:
                tokenizer.pad_token = tokenizer.eos_token
            model.config.pad_token_id = text_config.pad_token_id = tokenizer.pad_token_id
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if chat_template is not None:
            tokenizer.chat_template = chat_template
        self.tokenizer, self._pad_id, self._centring = tokenizer, text_config.pad_token_id, centring
        self.training = SupervisedEngine(
            PackedScorer(model), self._loss, config, device=device, total_steps=total_steps
        )
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def step(self, pairs: Sequence[EncodedPair]) -> dict[str, float]:
        """Train on a batch; return the loss before the step, and accuracy and margin over this rank's pairs."""
        self._seen = []
        items = together(pairs, self._pad_id, self.training.config.tokens_per_microbatch)
        loss = self.training.step(items, float(len(pairs)))
        chosen, rejected, probability = (
            torch.cat(values).double().cpu().numpy() for values in zip(*self._seen, strict=True)
        )
        measured = measures(chosen, rejected, probability)
        kept = [name for name in ("accuracy", "margin", "score_mean") if name in measured]
        return {"loss": loss, **{name: measured[name] for name in kept}}

    @torch.no_grad()
    def scores(self, pairs: Sequence[EncodedPair]) -> tuple[Array, Array]:
        limit = self.training.config.tokens_per_microbatch
        items = [together([pair], self._pad_id, limit)[0] for pair in pairs]
        chosen, rejected = np.zeros(len(pairs)), np.zeros(len(pairs))
        for batch in split_by_tokens([item.tokens for item in items], limit):
            first, second = self._pair_scores(self.training.engine, [items[i] for i in batch])
            chosen[batch], rejected[batch] = first.double().cpu().numpy(), second.double().cpu().numpy()
        return chosen, rejected

    def measure(self, pairs: Sequence[EncodedPair]) -> dict[str, float]:
        return measures(*self.scores(pairs), np.array([pair.pair.probability for pair in pairs]))

    def save(self, folder: Path) -> None:
        save_classifier(self.training, self.tokenizer, folder)

    def _pair_scores(self, module: Any, items: Sequence[PromptPairs]) -> tuple[Tensor, Tensor]:
        scores = module(pack([item.tree for item in items]).to(self.training.device))
        chosen, rejected = pair_indices(items)
        return scores[chosen], scores[rejected]

    def _loss(self, module: Any, items: Sequence[PromptPairs]) -> Tensor:
        chosen, rejected = self._pair_scores(module, items)
        pairs = [pair for item in items for pair in item.rows]
        margin = torch.tensor([pair.margin for pair in pairs], device=chosen.device)
        probability = torch.tensor([pair.probability for pair in pairs], device=chosen.device)
        self._seen.append((chosen.detach(), rejected.detach(), probability))
        return pair_losses(chosen, rejected, margin, probability, self._centring).sum()


def together(pairs: Sequence[EncodedPair], pad_id: int | None, limit: int) -> list[PromptPairs]:
    """Group pairs by prompt, so that its tokens, and a response in several pairs, are computed once. Groups of more
    than `limit` tokens are halved, down to single pairs."""
    by_prompt: dict[Any, list[EncodedPair]] = {}
    for pair in pairs:
        by_prompt.setdefault(pair.pair.prompt, []).append(pair)
    return [item for members in by_prompt.values() for item in items_within(members, partial(_item, pad_id), limit)]


def _item(pad_id: int | None, members: Sequence[EncodedPair]) -> PromptPairs:
    read = [(until_read(pair.chosen, pad_id), until_read(pair.rejected, pad_id)) for pair in members]
    sequences = list(dict.fromkeys(ids for both in read for ids in both))
    index = {ids: i for i, ids in enumerate(sequences)}
    indices = tuple((index[chosen], index[rejected]) for chosen, rejected in read)
    return PromptPairs(Tree.of(sequences), indices, rows=tuple(pair.pair for pair in members))


def measure_folder(
    folder: Path,
    encoder: Encoder,
    pairs: Sequence[EncodedPair],
    config: RewardTrainingConfig,
    context: TrainingContext,
) -> dict[str, float]:
    """Measure a saved model, run as the reward runs it. Raise ClassifierError if it is not a classifier."""
    from rewards.preference.scorers import load_scorer

    scorer = load_scorer(
        folder,
        device=context.device,
        dtype=config.dtype,
        threads=torch.get_num_threads(),
        tokens_per_batch=config.tokens_per_microbatch,
        tokenizer_pad_id=encoder.tokenizer.pad_token_id,
        backend="auto",
        canned=[Encoded(pairs[0].chosen), Encoded(pairs[0].rejected)],
    )
    scores = np.array(scorer.score([[Encoded(pair.chosen), Encoded(pair.rejected)] for pair in pairs]))
    return measures(scores[:, 0], scores[:, 1], np.array([pair.pair.probability for pair in pairs]))
