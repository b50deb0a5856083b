"""`reward=polar`: the raw score of a POLAR discriminator, which compares each response with reference answers."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from rewards.base import Reward, RewardConfig, RewardContext, RewardNeeds
from rewards.polar.plan import Reduce, plan_group, shared_prefix
from rewards.polar.serialise import (
    MARKER,
    RESERVED_TOKENS,
    SEPARATOR,
    Limits,
    SerialisationError,
    Serialiser,
    UnclosedThinking,
    Wrapper,
)
from rlkit.experience import Group, GroupScores

if TYPE_CHECKING:
    from rewards.polar.backends import Backend

CANNED = (
    ("What is the capital of China?", "Beijing.", "Beijing."),
    ("What is the capital of China?", "Beijing.", "Shanghai."),
)
"""What the start-up self-test scores: (prompt, reference, candidate)."""
TOKENS_TO_SPARE = 8
"""Positions of the model that `max_length` leaves free."""
FP32_TOLERANCE = 1e-3
HALF_TOLERANCE = 0.1
"""Largest difference between the backend and a plain forward pass, in fp32 and in bf16 or fp16."""


class PolarReward(Reward):
    """Scores by a discriminator: higher means more like the reference. The value is the raw, unbounded logit."""

    class Config(RewardConfig):
        """Options of the POLAR reward."""

        model_path: str = "embedded:polar"
        """Folder of a one-label `...ForSequenceClassification`; `embedded:polar` is the tiny one in the package."""
        backend: Literal["transformers", "vllm"] = "transformers"
        """What runs the model, in the reward's process: transformers (packed, shared prefixes) or vLLM's pooling."""
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
        """auto: bfloat16 on CUDA, float32 on CPU. The head is always computed in float32."""
        max_references: int = Field(default=1, ge=1)
        """References of a prompt that are used, best first."""
        reduce: Reduce = "mean"
        """How the scores against several references become one."""
        wrapper: Wrapper = "sft"
        """Between prompt and response: a line break (sft), or nothing (pretrain: the response continues the prompt)."""
        newline_before_empty: bool = True
        """An empty response keeps the wrapper's line break, as in the official client (its training code drops it)."""
        max_length: int | None = Field(default=None, ge=16)
        """Tokens of the whole input; null: 16384, or what the model takes if that is less."""
        max_response_length: int | None = Field(default=None, ge=1)
        """Tokens of reference and candidate each, cut on the right; null: a quarter of max_length."""
        unclosed_thinking: UnclosedThinking = "empty"
        """A `<think>` that never ends: score an empty answer, or keep the thought as the answer."""
        tokens_per_batch: int = Field(default=16384, ge=1)
        """transformers: tokens of one forward pass, shared prefixes counted for each sequence that has them."""
        memory_gib: float = Field(default=1.0, gt=0)
        """vllm on CPU: memory of the key-value cache."""
        gpu_memory_utilization: float = Field(default=0.3, gt=0, le=1)
        """vllm on CUDA: share of the GPU's memory that it takes."""

        @model_validator(mode="after")
        def _backend_options_act(self) -> Self:
            of_the_other = {"transformers": ("memory_gib", "gpu_memory_utilization"), "vllm": ("tokens_per_batch",)}
            for name in of_the_other[self.backend]:
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} has no effect with backend={self.backend}")
            return self

        @model_validator(mode="after")
        def _prompt_has_room(self) -> Self:
            if self.max_length is not None and self.max_response_length is not None:
                needed = 2 * self.max_response_length + RESERVED_TOKENS + 2
                if self.max_length < needed:
                    raise ValueError(
                        f"max_length={self.max_length} leaves no room for the prompt beside two responses of "
                        f"max_response_length={self.max_response_length}: it must be at least {needed}"
                    )
            return self

    @classmethod
    def needs(cls, config: Any) -> RewardNeeds:
        """What a response is compared with."""
        return RewardNeeds(references=True)

    def __init__(self, config: Any, context: RewardContext) -> None:
        super().__init__(config, context)
        self._serialiser: Serialiser | None = None
        self._backend: Backend | None = None
        self._max_length = 0

    @classmethod
    def check(cls, config: Any) -> list[str]:
        """Whether the folder holds a discriminator."""
        from rewards.polar.backends import check_folder
        from rlkit.embedded import model_folder

        try:
            lengths(config, check_folder(model_folder(config.model_path)))
        except ValueError as error:
            return [str(error)]
        return []

    def start(self) -> None:
        """Load tokenizer and model, and compare the backend's scores of a canned pair with a plain forward pass.

        Raises DiscriminatorError or SerialisationError with the cause.
        """
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from transformers import AutoTokenizer

        from rewards.polar.backends import check_folder
        from rlkit.embedded import model_folder

        folder = model_folder(self.config.model_path)
        limits, self._max_length = lengths(self.config, check_folder(folder))
        # No limit, hence no warning: parts are cut to their limits here.
        tokenizer = AutoTokenizer.from_pretrained(folder, model_max_length=10**9, trust_remote_code=False)
        self._serialiser = Serialiser(tokenizer, limits, self.config.wrapper, self.config.newline_before_empty)
        _check_white_space(self._serialiser, folder)
        self._backend = self._tested_backend(folder, self._serialiser)

    def score(self, groups: Sequence[Group]) -> list[GroupScores]:
        """Score every response against its prompt's references; equal responses of a group are computed once."""
        if self._backend is None or self._serialiser is None:
            raise RuntimeError("PolarReward.start() was not called, or failed")
        from rlkit.models.packing import Tree

        options = (self.config.max_references, self._max_length, self.config.unclosed_thinking)
        plans = [plan_group(group, self._serialiser, *options) for group in groups]
        comparisons = [comparison for plan in plans for comparison in plan.comparisons]
        logits = iter(self._backend.score([Tree(each.prefix, each.suffixes) for each in comparisons if each.suffixes]))
        return [
            plan.scores([[next(logits) for _ in each.suffixes] for each in plan.comparisons], self.config.reduce)
            for plan in plans
        ]

    def close(self) -> None:
        """Free the model."""
        if self._backend is not None:
            self._backend.close()
            self._backend = None

    def _tested_backend(self, folder: Path, serialiser: Serialiser) -> Backend:
        """The backend, after it scored two canned inputs as a plain forward pass does."""
        from rewards.polar.backends import TransformersBackend, VllmBackend, plain_scores
        from rlkit.models.packing import Tree

        sequences = [tuple(serialiser.token_ids(serialiser.text(*canned))) for canned in CANNED]
        device, dtype = self.context.device, self.config.dtype
        expected = plain_scores(folder, device, dtype, sequences)  # its model is freed before the backend loads its own
        backend: Backend
        if self.config.backend == "vllm":
            memory = (self.config.memory_gib, self.config.gpu_memory_utilization)
            backend = VllmBackend(folder, device, dtype, self._max_length, *memory)
        else:
            backend = TransformersBackend(folder, device, dtype, self.context.threads, self.config.tokens_per_batch)
        try:
            prefix = shared_prefix(sequences)
            found = backend.score([Tree(prefix, [ids[len(prefix) :] for ids in sequences])])
            exact = dtype == "float32" or (dtype == "auto" and device == "cpu")
            check_scores(found, expected, FP32_TOLERANCE if exact else HALF_TOLERANCE, self.config.backend)
        except BaseException:
            backend.close()
            raise
        return backend


def lengths(config: PolarReward.Config, model: Mapping[str, Any]) -> tuple[Limits, int]:
    """How to cut, and the longest input the model is given: `max_length` and a little more.

    A cut in the middle of a character is written with more tokens than were cut. Raises DiscriminatorError if the
    model (its config.json) takes less than what is asked for.
    """
    from rewards.polar.backends import DiscriminatorError

    positions = int(model.get("max_position_embeddings", 16384 + TOKENS_TO_SPARE))
    room = positions - TOKENS_TO_SPARE
    if config.max_length is not None and config.max_length > room:
        raise DiscriminatorError(
            f"reward.max_length={config.max_length} is more than {config.model_path} takes: {room} of its {positions} "
            "positions (null takes what there is)"
        )
    max_length = config.max_length or min(16384, room)
    max_response_length = config.max_response_length or max_length // 4
    if 2 * max_response_length + RESERVED_TOKENS + 2 > max_length:
        raise DiscriminatorError(
            f"reward.max_response_length={max_response_length} leaves no room for the prompt in the {max_length} "
            f"tokens that {config.model_path} takes"
        )
    return Limits(max_length, max_response_length), max_length + TOKENS_TO_SPARE


def _check_white_space(serialiser: Serialiser, folder: Path) -> None:
    """transformers may replace a folder's saved tokenizer by its model type's, which can lose spaces in silence."""
    expected = ["1", "+", "2", "3", f"4{SEPARATOR}1", "+", "2", f"5{MARKER}"]
    found = serialiser.text("1 + 2\n", "3\n4", "5").split()
    if found != expected:
        raise SerialisationError(f"the tokenizer in {folder} does not keep white space: {found} from {expected}")


def check_scores(found: Sequence[float], expected: Sequence[float], tolerance: float, backend: str) -> None:
    """Raise DiscriminatorError if a backend's scores are not those of a plain forward pass."""
    from rewards.polar.backends import DiscriminatorError

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


def _close(found: Sequence[float], expected: Sequence[float], tolerance: float) -> bool:
    return len(found) == len(expected) and all(
        abs(left - right) <= tolerance * max(1.0, abs(right)) for left, right in zip(found, expected, strict=True)
    )


def _rounded(scores: Sequence[float]) -> list[float]:
    return [round(score, 6) for score in scores]
