"""What a backend has to prove before training: that it scores two canned inputs as a plain forward pass does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from rewards.polar.backends import Backend, DiscriminatorError
from rewards.polar.plan import shared_prefix
from rewards.polar.serialise import MARKER, SEPARATOR, SerialisationError, Serialiser

CANNED = (
    ("What is the capital of China?", "Beijing.", "Beijing."),
    ("What is the capital of China?", "Beijing.", "Shanghai."),
)
"""(prompt, reference, candidate)"""
FP32_TOLERANCE = 1e-3
HALF_TOLERANCE = 0.1
"""Largest difference between the backend and a plain forward pass, in fp32 and in bf16 or fp16."""


def canned_inputs(serialiser: Serialiser) -> list[tuple[int, ...]]:
    """Token ids of the canned inputs."""
    return [tuple(serialiser.token_ids(serialiser.text(*canned))) for canned in CANNED]


def scores_of(backend: Backend, sequences: Sequence[tuple[int, ...]]) -> list[float]:
    """The backend's scores of the canned inputs. Raises DiscriminatorError if it refuses one."""
    from rlkit.models.packing import Tree

    prefix = shared_prefix(sequences)
    found: list[float] = []
    for score in backend.score([Tree(prefix, [ids[len(prefix) :] for ids in sequences])]):
        if isinstance(score, str):
            raise DiscriminatorError(f"self-test failed: {score}")
        found.append(score)
    return found


def check_white_space(serialiser: Serialiser, folder: Path) -> None:
    """transformers may replace a folder's saved tokenizer by its model type's, which can lose spaces in silence."""
    expected = ["1", "+", "2", "3", f"4{SEPARATOR}1", "+", "2", f"5{MARKER}"]
    found = serialiser.text("1 + 2\n", "3\n4", "5").split()
    if found != expected:
        raise SerialisationError(f"the tokenizer in {folder} does not keep white space: {found} from {expected}")


def check_scores(found: Sequence[float], expected: Sequence[float], tolerance: float, backend: str) -> None:
    """Raise DiscriminatorError if a backend's scores are not those of a plain forward pass."""
    if not all(math.isfinite(score) for score in (*found, *expected)):
        raise DiscriminatorError(f"the self-test gave non-finite scores: {backend} {found}, transformers {expected}")
    if _close(found, expected, tolerance):
        return
    squashed = [1 / (1 + math.exp(-score)) for score in expected]
    cause = (
        "they are the sigmoid of the raw scores: the activation is on"
        if _close(found, squashed, tolerance)
        else "is this the model that the folder holds, and does the backend support its architecture?"
    )
    raise DiscriminatorError(
        f"self-test failed: {backend} scores the canned inputs {_rounded(found)}, a plain transformers forward pass "
        f"{_rounded(expected)} (tolerance {tolerance:g}): {cause}"
    )


def check_unsquashed(found: Sequence[float], backend: str) -> None:
    """Without weights to compare with: raise DiscriminatorError if the scores cannot be raw logits."""
    if not all(math.isfinite(score) for score in found):
        raise DiscriminatorError(f"self-test failed: {backend} gives the scores {found}")
    if all(0 < score < 1 for score in found):
        raise DiscriminatorError(
            f"self-test failed: {backend} scores the canned inputs {_rounded(found)}, all between 0 and 1: this looks "
            "like a sigmoid of the raw scores, and would hide how bad bad answers are; switch the server's activation "
            "off, or, if these are raw scores, set reward.compare_at_start=true with the weights in reward.model_path"
        )


def _close(found: Sequence[float], expected: Sequence[float], tolerance: float) -> bool:
    return len(found) == len(expected) and all(
        abs(left - right) <= tolerance * max(1.0, abs(right)) for left, right in zip(found, expected, strict=True)
    )


def _rounded(scores: Sequence[float]) -> list[float]:
    return [round(score, 6) for score in scores]
