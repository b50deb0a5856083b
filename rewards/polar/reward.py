"""`reward=polar`: the raw score of a POLAR discriminator, which compares responses with reference answers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from rewards.base import Reward, RewardConfig, RewardContext, RewardTraits
from rewards.polar.backends import (
    FP32_TOLERANCE,
    HALF_TOLERANCE,
    Backend,
    DiscriminatorError,
    VllmBackend,
    canned_inputs,
    check_folder,
    check_scores,
    check_unsquashed,
    check_white_space,
    has_weights,
    plain_scores,
    scores_of,
)
from rewards.polar.serialise import RESERVED_TOKENS, Limits, Reduce, Serialiser, UnclosedThinking, Wrapper, plan_group
from rlkit.config.reach import nobody_at
from rlkit.experience import Group, GroupScores
from rlkit.experience.section import Deadline
from rlkit.models.folder import model_folder

BackendName = Literal["transformers", "vllm", "http_vllm", "http_sglang", "http_lmdeploy"]
SERVERS = tuple(name for name in get_args(BackendName) if name.startswith("http_"))
ACTS_WITH: dict[str, tuple[str, ...]] = {
    "tokens_per_batch": ("transformers",),
    "memory_gib": ("vllm",),
    "gpu_memory_utilization": ("vllm",),
    "urls": SERVERS,
    "served_model": SERVERS,
    "api_key_variable": SERVERS,
    "tokens_per_request": SERVERS,
    "concurrent_requests": SERVERS,
    "request_timeout_seconds": SERVERS,
    "compare_at_start": SERVERS,
}
"""Option -> the backends that use it; other backends reject it."""


class PolarConfig(RewardConfig):
    model_path: str = "embedded:polar"
    """Folder of a one-label `...ForSequenceClassification`; `embedded:polar` is the tiny one in the package. With a
    server: the folder whose tokenizer encodes the input."""
    backend: BackendName = "transformers"
    """In the reward's process: transformers (packed, shared prefixes) or vLLM's pooling runner. Outside it: a running
    vLLM, SGLang or LMDeploy server."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: bfloat16 on CUDA, float32 on CPU; the head is always float32. With a server: the server's dtype; float32
    makes the comparison at the start strict, auto allows for half precision."""
    max_references: int = Field(default=1, ge=1)
    """References used per prompt, best first."""
    reduce: Reduce = "mean"
    """How scores against several references are combined."""
    wrapper: Wrapper = "sft"
    """What is between prompt and response. sft: a line break; pretrain: nothing (the response continues the prompt)."""
    newline_before_empty: bool = True
    """An empty response keeps the wrapper's line break, as in the official client (its training code drops it)."""
    max_length: int | None = Field(default=None, ge=16)
    """Limit of the whole input in tokens; null: 16384, or the model's limit if that is less."""
    max_response_length: int | None = Field(default=None, ge=1)
    """Limit in tokens of reference and candidate each, truncated on the right; null: a quarter of max_length."""
    unclosed_thinking: UnclosedThinking = "empty"
    """For a `<think>` that is never closed. empty: score an empty answer; keep: use the thought as the answer."""
    tokens_per_batch: int = Field(default=16384, ge=1)
    """transformers: tokens per forward pass; shared prefixes count for each sequence."""
    memory_gib: float = Field(default=1.0, gt=0)
    """vllm on CPU: memory of the key-value cache."""
    gpu_memory_utilization: float = Field(default=0.3, gt=0, le=1)
    """vllm on CUDA: share of the GPU's memory."""
    urls: tuple[str, ...] = ()
    """Servers: base addresses of the replicas, like http://127.0.0.1:30000; requests go to them in turn."""
    served_model: str | None = None
    """Servers: the field `model` in requests; null: no such field, which a server with one model accepts."""
    api_key_variable: str | None = None
    """Servers: environment variable of the reward's process with the key for `Authorization: Bearer`."""
    tokens_per_request: int = Field(default=65536, ge=1)
    """Servers: input tokens per request (a longer input is sent alone)."""
    concurrent_requests: int = Field(default=8, ge=1)
    """Servers: concurrent requests per reward worker."""
    request_timeout_seconds: Deadline = 30.0
    """Servers: time after which a request is retried, on the next replica if there are several."""
    compare_at_start: bool = True
    """Servers: also score two canned inputs with the weights in model_path, and refuse a server whose scores differ.
    false: needs no weights, but only detects scores squashed into 0 to 1."""

    @field_validator("urls")
    @classmethod
    def _are_addresses(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"{url!r} is not an address; write it like http://127.0.0.1:30000")
        return tuple(url.rstrip("/") for url in urls)

    @model_validator(mode="after")
    def _backend_options_act(self) -> Self:
        for name, backends in ACTS_WITH.items():
            if self.backend not in backends and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} has no effect with backend={self.backend}")
        if self.backend in SERVERS and not self.urls:
            raise ValueError(f"backend={self.backend} needs urls, like urls=[http://127.0.0.1:30000]")
        if self.backend in SERVERS and self.request_timeout_seconds >= self.timeout_seconds:
            raise ValueError(
                f"request_timeout_seconds={self.request_timeout_seconds:g} must be less than "
                f"timeout_seconds={self.timeout_seconds:g}, or there is no time for a second try"
            )
        return self

    @model_validator(mode="after")
    def _prompt_has_room(self) -> Self:
        if self.max_length is not None and self.max_response_length is not None:
            needed = 2 * self.max_response_length + RESERVED_TOKENS + 2
            if self.max_length < needed:
                raise ValueError(
                    f"max_length={self.max_length} leaves no room for the prompt and two responses of "
                    f"max_response_length={self.max_response_length}: it must be at least {needed}"
                )
        return self


TOKENS_TO_SPARE = 8
"""Positions of the model that must remain beyond `max_length`."""
CONNECT_SECONDS = 30.0
"""Time for a server's first two scores (or its start)."""
SHARE_OF_DEADLINE = 0.9
"""Share of timeout_seconds for the servers, so that their error comes before the worker is killed."""


class PolarReward(Reward):
    """Raw, unbounded logit of a discriminator: higher means more like the reference."""

    Config: ClassVar[type[RewardConfig]] = PolarConfig

    @classmethod
    def traits(cls, config: Any) -> RewardTraits:
        """Return the traits; scores are raw (logits of the released model range from about -12 to +1)."""
        return RewardTraits(references=True, uses_gpu=config.backend not in SERVERS, raw_scores=True)

    def __init__(self, config: Any, context: RewardContext) -> None:
        super().__init__(config, context)
        self._serialiser: Serialiser | None = None
        self._backend: Backend | None = None
        self._max_length = 0

    @classmethod
    def check(cls, config: Any) -> list[str]:
        problems = []
        try:
            folder = model_folder(config.model_path)
            lengths(config, check_folder(folder))
            if not has_weights(folder) and (config.backend not in SERVERS or config.compare_at_start):
                remedy = "; or set reward.compare_at_start=false" if config.backend in SERVERS else ""
                problems.append(f"reward.model_path: {folder} holds no weights (*.safetensors, *.bin){remedy}")
        except ValueError as error:
            problems.append(str(error))
        if config.api_key_variable is not None and not os.environ.get(config.api_key_variable):
            problems.append(f"reward.api_key_variable: the environment has no {config.api_key_variable}")
        for url in config.urls:
            if problem := nobody_at(url):
                problems.append(f"reward.urls: no POLAR server answers there ({url}: {problem}); start it")
        return problems

    def start(self) -> None:
        """Load the model and check its scores for two canned inputs.

        Raise DiscriminatorError, SerialisationError or ServerError.
        """
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from transformers import AutoTokenizer

        folder = model_folder(self.config.model_path)
        limits, self._max_length = lengths(self.config, check_folder(folder))
        # Without a limit there is no warning; parts are cut to their limits here.
        tokenizer = AutoTokenizer.from_pretrained(folder, model_max_length=10**9, trust_remote_code=False)
        self._serialiser = Serialiser(tokenizer, limits, self.config.wrapper, self.config.newline_before_empty)
        check_white_space(self._serialiser, folder)
        if self.config.backend in SERVERS:
            self._backend = self._tested_server(folder, self._serialiser)
        else:
            self._backend = self._tested_backend(folder, self._serialiser)

    def score(self, groups: Sequence[Group]) -> list[GroupScores]:
        if self._backend is None or self._serialiser is None:
            raise RuntimeError("PolarReward.start() was not called, or failed")
        options = (self.config.max_references, self._max_length, self.config.unclosed_thinking)
        plans = [plan_group(group, self._serialiser, *options) for group in groups]
        trees = [comparison.tree for plan in plans for comparison in plan.comparisons]
        logits = iter(self._backend.score([tree for tree in trees if tree.suffixes]))
        return [
            plan.scores([[next(logits) for _ in item.tree.suffixes] for item in plan.comparisons], self.config.reduce)
            for plan in plans
        ]

    def close(self) -> None:
        if self._backend is not None:
            self._backend.close()
            self._backend = None

    def _tested_backend(self, folder: Path, serialiser: Serialiser) -> Backend:
        from rewards.services.scorer import Scorer

        inputs = canned_inputs(serialiser)
        device, dtype = self.context.device, self.config.dtype
        expected = plain_scores(folder, device, dtype, inputs)  # its model is freed before the backend loads its own
        backend: Backend
        if self.config.backend == "vllm":
            memory = (self.config.memory_gib, self.config.gpu_memory_utilization)
            backend = VllmBackend(folder, device, dtype, self._max_length, *memory)
        else:
            backend = Scorer.load(
                folder,
                head="score",
                device=device,
                dtype=dtype,
                threads=self.context.threads,
                tokens_per_batch=self.config.tokens_per_batch,
            )
        try:
            exact = dtype == "float32" or (dtype == "auto" and device == "cpu")
            tolerance = FP32_TOLERANCE if exact else HALF_TOLERANCE
            check_scores(scores_of(backend, inputs), expected, tolerance, self.config.backend)
        except BaseException:
            backend.close()
            raise
        return backend

    def _tested_server(self, folder: Path, serialiser: Serialiser) -> Backend:
        from rewards.polar.servers import WIRES, Server, ServerBackend

        config = self.config
        server = Server(
            config.urls,
            WIRES[config.backend],
            config.served_model,
            os.environ[config.api_key_variable] if config.api_key_variable else None,
            config.tokens_per_request,
            config.concurrent_requests,
            config.request_timeout_seconds,
        )
        inputs = canned_inputs(serialiser)
        expected = plain_scores(folder, "cpu", config.dtype, inputs) if config.compare_at_start else None
        for url in config.urls:  # every replica
            alone = ServerBackend(replace(server, urls=(url,)), CONNECT_SECONDS)
            scores = scores_of(alone, inputs)
            name = f"{config.backend} at {url}"
            if expected is not None:
                tolerance = FP32_TOLERANCE if config.dtype == "float32" else HALF_TOLERANCE
                check_scores(scores, expected, tolerance, name)
            else:
                check_unsquashed(scores, name)
        return ServerBackend(server, SHARE_OF_DEADLINE * config.timeout_seconds)


def lengths(config: PolarConfig, model: Mapping[str, Any]) -> tuple[Limits, int]:
    """Return the limits of the parts, and of the whole input.

    The latter is above `max_length`, because a cut inside a character adds tokens. Raise DiscriminatorError if the
    model accepts less.
    """
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
