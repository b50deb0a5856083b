"""The discriminator that training starts from: one trained before, or a language model with a zero head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rewards.polar.backends import RELEASED_ARCHITECTURE
from rewards.polar.serialise import MARKER, SEPARATOR
from rlkit.data.rendering import load_tokenizer
from rlkit.models.policy import ModelLoadError, PackedScorer, load_scorer, load_value_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_start(folder: Path) -> tuple[PreTrainedTokenizerBase, PackedScorer]:
    """Tokenizer and model. Raises ModelLoadError with the remedy.

    A language model gets a head of zeros (the first pair loss is then ln 2) and, where its tokenizer has no tokens for
    POLAR's two markers, those: their embeddings start as the mean of all others.
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
    model.config.problem_type = "regression"  # with it vLLM's classify gives the raw score
    model.config.tie_word_embeddings = False  # a classifier has no output embeddings
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    missing = [text for text in (SEPARATOR, MARKER) if len(tokenizer.encode(text, add_special_tokens=False)) != 1]
    if missing:
        tokenizer.add_special_tokens({"additional_special_tokens": missing}, replace_extra_special_tokens=False)
        _make_room(model, len(tokenizer), len(missing))
    return tokenizer, PackedScorer(model)


def _make_room(model: Any, tokens: int, new: int) -> None:
    """Embeddings for the last `new` of so many tokens."""
    embeddings = model.get_input_embeddings().weight
    if embeddings.shape[0] < tokens:
        model.resize_token_embeddings(tokens, mean_resizing=False)
        embeddings = model.get_input_embeddings().weight
    with torch.no_grad():
        embeddings[tokens - new : tokens] = embeddings[: tokens - new].mean(0)
