"""A one-label sequence classifier, packed, or padded as transformers does it; head in fp32."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from rewards.preference.inputs import ClassifierError, Encoded, until_read
from rewards.services.scorer import Scorer
from rlkit.models.attention import PACKED_ATTENTION
from rlkit.models.forward import PackedScorer
from rlkit.models.packing import Tree
from rlkit.models.policy import resolve_dtype

log = logging.getLogger(__name__)

Backend = Literal["auto", "packed", "padded"]
FP32_TOLERANCE = 1e-3
HALF_TOLERANCE = 0.1
"""Largest difference between packed and padded scores in fp32, and in bf16 or fp16."""
HEADS = ("score", "classifier")
"""transformers' names, by model family."""


class Classifier:
    def __init__(self, model: Any, pad_id: int | None, device: str, tokens_per_batch: int) -> None:
        self._model = model
        self._pad_id, self._device, self._tokens_per_batch = pad_id, device, tokens_per_batch
        self._packed: Scorer | None = None
        self._plain_attention: str = model.config._attn_implementation

    @property
    def packed(self) -> bool:
        return self._packed is not None

    def score(self, groups: Sequence[Sequence[Encoded]]) -> list[list[float]]:
        """Raw logits in the same shape; equal inputs of a group are computed once."""
        unique = [list(dict.fromkeys(group)) for group in groups]
        flat = iter(self._score_padded(unique) if self._packed is None else self._score_packed(self._packed, unique))
        logits = [{item: next(flat) for item in items} for items in unique]
        return [[by_input[item] for item in group] for group, by_input in zip(groups, logits, strict=True)]

    def use_packed(self, canned: Sequence[Encoded], longest: int, insist: bool) -> None:
        """Run packed if that gives the padded scores. Raise ClassifierError if not and `insist`."""
        why = self._not_packable(longest)
        if not why:
            (expected,) = self.score([canned])
            self._model.set_attn_implementation(PACKED_ATTENTION)
            self._packed = Scorer(
                PackedScorer(self._model), device=self._device, tokens_per_batch=self._tokens_per_batch
            )
            why = self._difference(canned, expected)
        if not why:
            return
        if self._packed is not None:
            self._packed = None
            self._model.set_attn_implementation(self._plain_attention)
        if insist:
            raise ClassifierError(f"reward.backend=packed cannot run {type(self._model).__name__}: {why}; use padded")
        log.info("%s runs padded, not packed: %s", type(self._model).__name__, why)

    def _not_packable(self, longest: int) -> str:
        head, config = getattr(self._model, "score", None), self._model.config.get_text_config()
        window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
        if type(head) is not nn.Linear or head.bias is not None:
            return "its head is not a plain linear one named score"
        if not getattr(self._model, "_supports_attention_backend", False):
            return "its attention cannot be exchanged"
        if window is not None and window < longest:
            return f"its sliding window of {window} is shorter than its input"
        return ""

    def _difference(self, canned: Sequence[Encoded], expected: Sequence[float]) -> str:
        try:
            (scores,) = self.score([canned])
        except (ValueError, TypeError) as error:
            return str(error)
        exact = self._model.dtype == torch.float32
        tolerance = FP32_TOLERANCE if exact else HALF_TOLERANCE
        close = all(
            abs(left - right) <= tolerance * max(1.0, abs(right)) for left, right in zip(scores, expected, strict=True)
        )
        return "" if close else f"it gives {scores} where transformers gives {list(expected)}"

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
            # Without a padding token transformers would read the score at the padding.
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
    longest: int,
) -> Classifier:
    """Load the model; two canned inputs must get finite scores and, if packed, those of transformers.

    Raise ClassifierError if weights are missing (the head would start at random), or if it cannot be run as asked.
    """
    torch.set_num_threads(threads)
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=resolve_dtype(dtype, device), trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ClassifierError(f"reward.model_path: the model in {folder} does not load: {reason}") from error
    lost = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if lost:
        raise ClassifierError(
            f"reward.model_path: {folder} lacks {', '.join(lost[:5])}: they would start at random, and scores would "
            "mean nothing; name a folder with a trained head"
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
    if backend != "padded":
        classifier.use_packed(canned, longest, insist=backend == "packed")
    return classifier


def _head_in_fp32(model: Any, folder: Path) -> None:
    """Raw scores in 16 bit lie far apart; the head's product costs nothing in fp32."""
    heads = [head for name in HEADS if isinstance(head := getattr(model, name, None), nn.Module)]
    if not heads:
        raise ClassifierError(
            f"reward.model_path: {folder}: {type(model).__name__} has no head named score or classifier"
        )
    head = heads[0]
    head.float()
    head.register_forward_pre_hook(lambda _, inputs: tuple(value.float() for value in inputs))
