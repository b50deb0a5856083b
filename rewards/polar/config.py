"""The options of `reward=polar`, and which of them act with which backend."""

from __future__ import annotations

from typing import Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from rewards.base import RewardConfig
from rewards.polar.plan import Reduce
from rewards.polar.serialise import RESERVED_TOKENS, UnclosedThinking, Wrapper

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
"""Option -> the backends it has an effect with; with any other it is refused."""


class PolarConfig(RewardConfig):
    """Options of the POLAR reward."""

    model_path: str = "embedded:polar"
    """Folder of a one-label `...ForSequenceClassification`; `embedded:polar` is the tiny one in the package.

    With a server: the folder whose tokenizer writes the input (the server needs none).
    """
    backend: BackendName = "transformers"
    """What runs the model. In the reward's process: transformers (packed, shared prefixes) or vLLM's pooling runner;
    elsewhere: a running vLLM, SGLang or LMDeploy server."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: bfloat16 on CUDA, float32 on CPU. The head is always computed in float32. With a server: what it was
    started with; float32 makes the comparison at the start strict, auto allows for half precision."""
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
    urls: tuple[str, ...] = ()
    """Servers: base addresses of one or several replicas, like http://127.0.0.1:30000; requests go to each in turn."""
    served_model: str | None = None
    """Servers: the `model` that requests name; null: they name none, which a server with one model takes."""
    api_key_variable: str | None = None
    """Servers: environment variable of the reward's process with the key for `Authorization: Bearer`."""
    tokens_per_request: int = Field(default=65536, ge=1)
    """Servers: tokens of the inputs in one request (an input above it gets a request of its own)."""
    concurrent_requests: int = Field(default=8, ge=1)
    """Servers: requests that each reward worker has open at a time."""
    request_timeout_seconds: float = Field(default=30.0, gt=0, allow_inf_nan=False)
    """Servers: after this a request is given up and made again, of the next replica if there are several."""
    compare_at_start: bool = True
    """Servers: score two canned inputs with the weights in model_path, too, and refuse a server that differs. false
    needs no weights there, and only notices scores that were squashed into 0 to 1."""

    @field_validator("urls")
    @classmethod
    def _are_addresses(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"{url!r} is no address; write it like http://127.0.0.1:30000")
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
                    f"max_length={self.max_length} leaves no room for the prompt beside two responses of "
                    f"max_response_length={self.max_response_length}: it must be at least {needed}"
                )
        return self
