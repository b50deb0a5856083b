"""What a folder must hold to serve as preference reward, as far as its config.json tells. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LONGEST_INPUT = 32768
"""Tokens taken where neither the model nor its tokenizer states a limit."""


class ClassifierError(ValueError):
    """A model folder that cannot serve as preference reward; the message says why and what to do."""


def check_classifier(folder: Path) -> dict[str, Any]:
    """The model's config.json. Raises ClassifierError if this is no one-label sequence classifier."""
    path = folder / "config.json"
    if not path.is_file():
        raise ClassifierError(f"reward.model_path: {folder} holds no config.json; name a Hugging Face model folder")
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ClassifierError(f"reward.model_path: {path} is no JSON: {error}") from error
    (architecture, *_) = config.get("architectures") or ["(none)"]
    if not architecture.endswith("ForSequenceClassification"):
        raise ClassifierError(
            f"reward.model_path: {folder} holds a {architecture}; a preference reward is a "
            "`...ForSequenceClassification` with one label and a trained head (python -m rlkit.train_reward "
            "reward=preference makes one of a causal language model)"
        )
    labels = len(config["id2label"]) if "id2label" in config else config.get("num_labels", 2)
    if labels != 1:
        raise ClassifierError(f"reward.model_path: {folder} has {labels} labels; a preference reward has one")
    return config


def positions(config: dict[str, Any]) -> int:
    """Tokens that the model takes, by its config.json."""
    text = config.get("text_config", config)
    return int(text.get("max_position_embeddings") or LONGEST_INPUT)
