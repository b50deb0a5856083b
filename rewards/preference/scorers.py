"""Runs a one-label sequence classifier, packed, or padded as in transformers, with its head in fp32."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from rewards.preference.inputs import ClassifierError, Encoded, until_read
from rewards.services.scorer import Scorer
from rlkit.models.attention import PACKED_ATTENTION
from rlkit.models.forward import ModelLoadError, PackedScorer, runs_packed
from rlkit.models.packing import Tree
from rlkit.models.policy import resolve_dtype
from rlkit.models.selftest import choose_attention

log = logging.getLogger(__name__)

Backend = Literal["auto", "packed", "padded"]
HEADS = ("score", "classifier")
"""transformers' names of the head, which differ by model family."""


class Classifier:
    def __init__(self, model: Any, pad_id: int | None, device: str, tokens_per_batch: int) -> None:
        """Run packed if the model's attention is the packed one."""
        self._model, self._pad_id, self._device, self._tokens_per_batch = model, pad_id, device, tokens_per_batch
        self._packed: Scorer | None = None
        if runs_packed(model):
            self._packed = Scorer(PackedScorer(model), device=device, tokens_per_batch=tokens_per_batch)

    @property
    def packed(self) -> bool:
        return self._packed is not None

    def score(self, groups: Sequence[Sequence[Encoded]]) -> list[list[float]]:
        """Return raw logits in the shape of `groups`; equal inputs of a group are computed once."""
        unique = [list(dict.fromkeys(group)) for group in groups]
        flat = iter(self._score_padded(unique) if self._packed is None else self._score_packed(self._packed, unique))
        logits = [{item: next(flat) for item in items} for items in unique]
        return [[by_input[item] for item in group] for group, by_input in zip(groups, logits, strict=True)]

    def _score_packed(self, scorer: Scorer, groups: Sequence[Sequence[Encoded]]) -> list[float]:
        return scorer.score([Tree.of([until_read(item.ids, self._pad_id) for item in group]) for group in groups])

    @torch.inference_mode()
    def _score_padded(self, groups: Sequence[Sequence[Encoded]]) -> list[float]:
        items = [item for group in groups for item in group]
        scores = [0.0] * len(items)
        order = sorted(range(len(items)), key=lambda i: -len(items[i].ids))
        start = 0
        while start < len(order):
            longest = len(items[order[start]].ids)
            # Without a padding token, transformers would read the score at the padding.
            size = 1 if self._pad_id is None else max(1, self._tokens_per_batch // longest)
            batch = order[start : start + size]
            for i, value in zip(batch, self._forward([items[i] for i in batch], longest).tolist(), strict=True):
                scores[i] = value
            start += len(batch)
        return scores

    def _forward(self, items: Sequence[Encoded], longest: int) -> Tensor:
        """[N] fp32, by transformers' padded forward pass."""
        pad = self._pad_id or 0
        inputs = {
            "input_ids": [[*item.ids, *[pad] * (longest - len(item.ids))] for item in items],
            "attention_mask": [[1] * len(item.ids) + [0] * (longest - len(item.ids)) for item in items],
        }
        if items[0].types:
            inputs["token_type_ids"] = [[*item.types, *[0] * (longest - len(item.types))] for item in items]
        tensors = {name: torch.tensor(rows, device=self._device) for name, rows in inputs.items()}
        logits: Tensor = self._model(**tensors).logits
        return logits[:, 0].float()


def load_scorer(
    folder: Path,
    *,
    device: str,
    dtype: str,
    threads: int,
    tokens_per_batch: int,
    tokenizer_pad_id: int | None,
    backend: Backend,
    canned: Sequence[Encoded],
) -> Classifier:
    """Load the model and check that two canned inputs get finite scores.

    Raise ClassifierError if weights are missing (the head would be random), or if the model cannot run as requested.
    """
    torch.set_num_threads(threads)
    try:
        attention = {} if backend == "padded" else _attention(folder, insist=backend == "packed")
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=resolve_dtype(dtype, device), trust_remote_code=False, output_loading_info=True, **attention
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        if isinstance(error, ClassifierError):
            raise
        reason = " ".join(str(error).split())
        raise ClassifierError(f"reward.model_path: the model in {folder} does not load: {reason}") from error
    lost = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if lost:
        raise ClassifierError(
            f"reward.model_path: {folder} lacks {', '.join(lost[:5])}: they would be random, and the scores "
            "meaningless; name a folder with a trained head"
        )
    config = model.config.get_text_config()
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer_pad_id
    if config.pad_token_id is None and backend == "padded":
        raise ClassifierError(
            f"reward.model_path: neither config.json nor the tokenizer of {folder} names a padding token, which "
            "reward.backend=padded needs"
        )
    _head_in_fp32(model, folder)
    classifier = Classifier(model.to(device).eval(), config.pad_token_id, device, tokens_per_batch)
    (values,) = classifier.score([canned])
    if not all(math.isfinite(value) for value in values):
        raise ClassifierError(f"reward.model_path: {folder} scores two short inputs {values}, not finite")
    return classifier


def _attention(folder: Path, *, insist: bool) -> dict[str, str]:
    """Return the attention to load with: the packed one if its scores are exact, else one for padded inputs or none."""
    config = AutoConfig.from_pretrained(folder)
    try:
        attention = choose_attention(config, AutoModelForSequenceClassification)
    except ModelLoadError as error:
        attention, why = "", str(error)
    else:
        why = "only single sequences are exact"
    if attention == PACKED_ATTENTION:
        return {"attn_implementation": attention}
    name = (config.architectures or [config.model_type])[0]
    if insist:
        raise ClassifierError(f"reward.backend=packed cannot run {name}: {why}; use padded")
    log.info("%s runs padded, not packed: %s", name, why)
    return {"attn_implementation": attention} if attention else {}


def _head_in_fp32(model: Any, folder: Path) -> None:
    """Run the head in fp32, which costs nothing: in 16 bits, representable raw scores are far apart."""
    heads = [head for name in HEADS if isinstance(head := getattr(model, name, None), nn.Module)]
    if not heads:
        raise ClassifierError(
            f"reward.model_path: {folder}: {type(model).__name__} has no head named score or classifier"
        )
    head = heads[0]
    head.float()
    head.register_forward_pre_hook(lambda _, inputs: tuple(value.float() for value in inputs))
